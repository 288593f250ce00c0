"""ssl-exit predict"""

import os
import sys
from pathlib import Path
from typing import Any, Literal


def predict(
    model: str,
    data: str,
    out: str = "labels.csv",
    embeddings: str | None = None,
    audit: float | None = None,
    compile: bool | None = None,
    num_workers: int = 0,
    max_pixels: int | None = None,
    trust: str | None = None,
    device: str = "auto",
    engine: Literal["here", "ray"] = "here",
    actors: int = 1,
    id_column: str | None = None,
    checkpoint: str | None = None,
) -> None:
    """Cluster a folder of images with early exits.

    Rows are written as they come; after an interrupt or a kill the same command continues where it stopped.

    Args:
        model: folder that fit wrote.
        data: folder of images, searched recursively; or a tar shard, a Parquet file, or a folder of such.
        out: file of path, label, exit, score, as .csv, .jsonl or .parquet; label -1 for an image that cannot be used;
            - writes CSV to standard output.
        embeddings: also write final features, a .npy file of float32, (N, F), in the order of the rows, NaN for an
            image that cannot be used; takes a full pass of the encoder.
        audit: share of the images that leave early which go on to the end too; that of fit if not set.
        compile: run full batches through torch.compile; as in fit if not set.
        num_workers: processes that decode images.
        max_pixels: of one image file, larger ones are skipped; as in fit if not set.
        trust: the module:function of a model whose encoder was built by code of yours (on the Python path): it is
            imported and called.
        device: auto, cpu, cuda, cuda:1, ...
        engine: here, in this process; or ray, by Ray Data (pip install 'ssl-exit[ray]'): out is then a folder of
            Parquet files of id, label, exit, score and reason, in no order.
        actors: of Ray, the processes that label.
        id_column: of Ray, the column of Parquet files that tells rows apart; images have their path.
        checkpoint: of Ray, a folder of ids that are done, behind which the same command continues after a kill.
    """
    if engine == "ray":
        from ssl_exit.errors import InputError

        if embeddings or num_workers or compile is not None:
            raise InputError("--embeddings, --compile and --num-workers are not for --engine ray")
        os.environ.setdefault("RAY_DATA_NON_TTY_PROGRESS_LOG_INTERVAL", "60")  # seconds, where there is no terminal
        os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")  # or Ray would send the current folder to workers
        from ssl_exit.scale import label_files

        asked: dict[str, Any] = {"id_column": id_column, "checkpoint": checkpoint, "actors": actors}
        n, audited = label_files(
            data, model, out, audit=audit, device=device, trust=trust, max_pixels=max_pixels, **asked
        )
        print(f"{n} rows in {out}" + (f"\naudit: {audited}" if audited else ""))
        return
    from ssl_exit.cli.common import check_embeddings, label_images, list_skipped, write_embeddings
    from ssl_exit.clusterer import load
    from ssl_exit.data.images import open_files

    if embeddings:
        check_embeddings(Path(embeddings))
    c = load(model, device=device, trust=trust, audit=audit, compile=compile)
    c.set_params(runtime__num_workers=num_workers)
    images = open_files(Path(data), c.preprocessing, max_pixels or c.runtime.max_pixels, c.runtime.image_key)
    skipped, summary = label_images(c, images, Path(data), None if out == "-" else Path(out))
    list_skipped(skipped, images.paths)
    if embeddings:
        write_embeddings(Path(embeddings), c, images)
        summary += f"; final features to {embeddings}"
    print(summary, file=sys.stderr if out == "-" else sys.stdout)
    if c.audit_ is not None:
        print(f"audit: {c.audit_}", file=sys.stderr if out == "-" else sys.stdout)
