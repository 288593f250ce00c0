"""ssl-exit predict"""

import sys
from pathlib import Path


def predict(
    model: str,
    data: str,
    out: str = "labels.csv",
    audit: float | None = None,
    compile: bool | None = None,
    num_workers: int = 0,
    max_pixels: int | None = None,
    trust: str | None = None,
    device: str = "auto",
) -> None:
    """Cluster a folder of images with early exits.

    Rows are written as they come; after an interrupt or a kill the same command continues where it stopped.

    Args:
        model: folder that fit wrote.
        data: folder of images, searched recursively.
        out: CSV file: path, label, exit, score; label -1 for an image that cannot be used.
        audit: share of the images that leave early which go on to the end too; that of fit if not set.
        compile: run full batches through torch.compile; as in fit if not set.
        num_workers: processes that decode images.
        max_pixels: of one image file, larger ones are skipped; as in fit if not set.
        trust: the module:function of a model whose encoder was built by code of yours (on the Python path): it is
            imported and called.
        device: auto, cpu, cuda, cuda:1, ...
    """
    import json

    from ssl_exit.cli.common import list_skipped
    from ssl_exit.clusterer import load
    from ssl_exit.data.image_files import FolderImages
    from ssl_exit.report.label_file import LabelFile

    c = load(model, device=device, trust=trust, audit=audit, compile=compile)
    c.set_params(runtime__num_workers=num_workers)
    images = FolderImages(Path(data), c.preprocessing, max_pixels or c.runtime.max_pixels)
    key = json.dumps([c.model_.hashes(), str(Path(data).resolve())])
    skipped: dict[int, str] = {}
    cost, clustered = 0.0, 0
    with LabelFile(Path(out), images.paths, c.exit_names_, key, list(images.versions())) as labels:
        before = labels.n_rows
        if before:
            print(f"continuing behind {before} rows of a run that was stopped", file=sys.stderr)
        for result in c.stream(images, labels.n_rows):
            skipped |= {labels.n_rows + position: reason for position, reason in result.skipped.items()}
            good = result.labels >= 0
            cost, clustered = cost + result.cost[good].sum(), clustered + int(good.sum())
            labels.add(result)
    list_skipped(skipped, images.paths)
    mean = f" at mean cost {cost / clustered:.3f} of the full encoder's multiply-adds" if clustered else ""
    behind = f" (behind the {before} rows of a run that was stopped)" if before else ""
    print(f"{clustered} images clustered{mean}, {len(skipped)} skipped{behind}; written to {out}")
    if c.audit_ is not None:
        print(f"audit: {c.audit_}")
