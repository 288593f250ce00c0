"""Labels of a Ray Dataset of images."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssl_exit.data.image_files import EXTENSIONS, KEYS
from ssl_exit.errors import InputError, shown
from ssl_exit.exits.audit import DriftAudit
from ssl_exit.model import Model
from ssl_exit.scale.columns import LabelColumns, audit_of

if TYPE_CHECKING:
    from ray.data import Dataset

PER_CALL = 32  # batches of the engine in a call: fewer lose more to the flush at its end


def label_dataset(
    dataset: "Dataset",
    model: str | Path | Model,
    image_column: str = "image",
    id_column: str | None = None,
    *,
    actors: int = 1,
    gpus_per_actor: float = 0,
    images_per_call: int = 1024,
    **options: Any,
) -> "Dataset":
    """Label the images of a Ray Dataset by a pool of actors, each of which loads the model once.

    The order of rows is not kept. An actor that dies is started again and its rows are computed anew; `ray.data`'s
    checkpoints (`DataContext.checkpoint_config`, by `id_column`) continue a driver that died.

    Args:
        dataset: rows with a column of images (see `LabelColumns`), such as `ray.data.read_parquet` or
            `read_binary_files(..., include_paths=True)` gives.
        model: a folder that every node can read, or the fitted model itself.
        image_column: name of the column of images.
        id_column: the only other column that is kept; None (default) keeps all others.
        actors: number of processes that label.
        gpus_per_actor: GPUs that each of them takes; may be a fraction.
        images_per_call: rows an actor takes at a time; the engine runs on a thirty-second of them at a time.
        options: others of `LabelColumns`.

    Returns:
        A lazy Dataset with the columns label, exit, score and reason, beside those that are kept.

    Raises:
        InputError: Ray is missing, numbers that cannot be, or a cluster without a CPU beside the actors.
    """
    if actors < 1 or images_per_call < 1 or gpus_per_actor < 0:
        raise InputError(
            "actors and images_per_call must be at least 1 and gpus_per_actor at least 0; got "
            f"{actors}, {images_per_call}, {gpus_per_actor}"
        )
    ray = _start()
    cpus = ray.cluster_resources().get("CPU", 0.0)
    if cpus < 2:
        raise InputError(f"Ray has {cpus:g} CPUs; labelling needs two, one for reading beside the actors")
    others = 1 if ray.data.DataContext.get_current().checkpoint_config is None else 2  # readers, and what is done
    options.setdefault("batch_size", max(1, images_per_call // PER_CALL))
    labels = LabelColumns(str(model) if isinstance(model, Path) else model, image_column, id_column, **options)
    return dataset.map_batches(
        _Actor,
        fn_constructor_args=(labels,),
        batch_size=images_per_call,
        batch_format="numpy",
        compute=ray.data.ActorPoolStrategy(size=actors),
        num_cpus=max(0.0, min(1.0, (cpus - others) / actors)),  # with none left for readers Ray waits for ever
        num_gpus=gpus_per_actor,
    )


def label_files(
    data: str,
    model: str | Path | Model,
    out: str,
    *,
    id_column: str | None = None,
    image_column: str | None = None,
    checkpoint: str | None = None,
    audit: float | None = None,
    **options: Any,
) -> tuple[int, DriftAudit | None]:
    """Label images in files by Ray Data, and write Parquet files of id, label, exit, score and reason.

    Args:
        data: a folder of images, of tar shards or of Parquet files, or one such file; local, or as pyarrow and Ray read
            it (s3://...), where a folder is taken for one of images.
        model: as in `label_dataset`.
        out: folder for Parquet files, new or empty, unless a checkpoint continues it.
        id_column: of Parquet files, the column that tells rows apart; of images it is their "path", in a tar shard that
            of the shard and of the member.
        image_column: of Parquet files; None: the first of the usual names.
        checkpoint: folder in which Ray keeps the ids that are done; the same call continues behind them.
        audit: as in `LabelColumns`.
        options: others of `label_dataset`.

    Returns:
        The number of rows in `out`, and the audit of all of them, if there is one.

    Raises:
        InputError: as in `label_dataset`; a Parquet file without an id; a folder that holds something else; or whatever
            failed in a worker.
    """
    ray = _start()
    folder = Path(out)
    if checkpoint is None and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{out!r} exists and holds something; choose a new folder, or continue by --checkpoint")
    context = ray.data.DataContext.get_current()
    before = context.checkpoint_config
    try:
        kind = _kind(data)
        if kind == "parquet":
            names = list(ray.data.read_parquet(data).schema().names)
            if id_column not in names:
                raise InputError(f"rows of Parquet files need an id (--id-column); columns are {shown(names)}")
            image_column = image_column or next((name for name in (*KEYS, "bytes") if name in names), "image")
        else:
            id_column, image_column = "path", "bytes"
        if checkpoint is not None:  # a Dataset takes it from the context in which it is made
            from ray.data.checkpoint import CheckpointConfig

            context.checkpoint_config = CheckpointConfig(id_column, checkpoint, delete_checkpoint_on_success=False)
        rows = _rows(data, kind, [str(id_column), image_column])
        label_dataset(rows, model, image_column, id_column, audit=audit, **options).write_parquet(out)
    except ray.exceptions.RayError as error:
        raise InputError(f"labelling by Ray failed: {_reason(str(error))}") from error
    finally:
        context.checkpoint_config = before
    written = ray.data.read_parquet(out)
    schema = written.schema()
    if schema is None or "audited" not in schema.names:
        return written.count(), None
    keys = ("actors", "gpus_per_actor", "images_per_call")
    labels = LabelColumns(model, **{name: value for name, value in options.items() if name not in keys})
    parts = ray.data.read_parquet(out, columns=["label", "audited"]).iter_batches(batch_size=8192, batch_format="numpy")
    return written.count(), audit_of(parts, labels.model, audit)


def _reason(text: str) -> str:
    """What was raised in a worker, of the traceback that Ray makes of it, without its own wrappers and advice."""
    raised = [line for line in re.findall(r"^[\w.]+: .+", text, re.MULTILINE) if "UserCodeException" not in line]
    return next((line.strip() for line in [*reversed(raised), *text.splitlines()] if line.strip()), "no reason given")


def _kind(data: str) -> str:
    """parquet, tar or images."""
    for kind in ("parquet", "tar"):
        if data.endswith(f".{kind}") or any(Path(data).glob(f"*.{kind}")):
            return kind
    return "images"


def _rows(data: str, kind: str, columns: list[str]) -> "Dataset":
    import ray.data

    if kind == "parquet":
        return ray.data.read_parquet(data, columns=columns)
    if kind == "tar":
        from ssl_exit.scale.tar_source import TarShards

        return ray.data.read_datasource(TarShards(data, file_extensions=["tar"]))
    extensions = [extension[1:] for extension in EXTENSIONS]
    return ray.data.read_binary_files(data, include_paths=True, file_extensions=extensions)


def _start() -> Any:
    """Ray, joined where a cluster is (RAY_ADDRESS), else started here.

    Raises:
        InputError: it is not installed.
    """
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise InputError("labelling by Ray needs Ray Data: pip install 'ssl-exit[ray]'") from error
    if not ray.is_initialized():
        ray.init(include_dashboard=False, log_to_driver=False)
    return ray


class _Actor:
    """Ray makes one in every worker."""

    def __init__(self, labels: LabelColumns) -> None:
        self.labels = labels
        labels.model  # noqa: B018  # loaded before the first rows come

    def __call__(self, columns: dict[str, Any]) -> dict[str, Any]:
        return self.labels(columns)
