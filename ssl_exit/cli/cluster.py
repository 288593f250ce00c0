"""ssl-exit cluster"""

from pathlib import Path
from typing import Any

from ssl_exit.settings import Settings

ENCODER = "timm:vit_small_patch14_dinov2.lvd142m"  # DINOv2 (arXiv 2304.07193): good clusters of photographs as it is
MOST = 2_000  # images held out from fitting that the report is about
OPTIONS = {"img_size": 224}  # it was trained at 518 pixels, at five times the cost


def cluster(
    folder: str,
    settings: Settings,
    out: str = "clusters",
    encoder: str = ENCODER,
    weights: str | None = None,
    weights_prefix: str | None = None,
    encoder_options: dict[str, Any] | None = None,
    size: int | None = None,
    crop: float | None = None,
    mean: list[float] | None = None,
    std: list[float] | None = None,
) -> None:
    """Cluster a folder of images, from nothing to a page to look at: fit, predict, evaluate and report in one.

    After an interrupt or a kill the same command continues where it stopped.

    Args:
        folder: of images, searched recursively; or a tar shard, a Parquet file, or a folder of such.
        settings: all parameters.
        out: folder for labels.csv, labels.parquet, report.html, report.json and the model.
        encoder: DINOv2 small by timm; or as in `fit`.
        weights: as in `fit`; those of the default encoder are downloaded if not set.
        weights_prefix: of the encoder's keys in the weights file, such as teacher.backbone.; found if not set.
        encoder_options: arguments of the architecture, such as --encoder-options.img_size 224.
        size: height and width in pixels of what the encoder sees; like crop, mean and std, if not set, that of the
            training where the weights name it, else 224 (1, ImageNet's).
        crop: share of the shorter side kept by the centre crop.
        mean: per channel, of pixels in [0, 1]; one entry for grey images.
        std: per channel, of pixels in [0, 1].
    """
    import importlib.util
    import shutil

    from ssl_exit.cli.common import (
        encoder_spec,
        evaluate_held_out,
        label_images,
        list_skipped,
        preprocessing_for,
        write_json,
    )
    from ssl_exit.cli.resume import ResumableFolder
    from ssl_exit.clusterer import ExitClusterer, load
    from ssl_exit.data.images import open_files
    from ssl_exit.files import file_hash
    from ssl_exit.report.label_file import as_parquet, labels_in
    from ssl_exit.report.page import write_report
    from ssl_exit.report.tables import evaluation_report, fit_summary

    where = Path(out)
    if encoder == ENCODER:
        weights, encoder_options = weights or "DEFAULT", OPTIONS | (encoder_options or {})
    spec = encoder_spec(encoder, weights, encoder_options, weights_prefix)
    preprocessing = preprocessing_for(spec, size=size, mean=mean, std=std, crop=crop)
    runtime = settings.runtime
    images = open_files(Path(folder), preprocessing, runtime.max_pixels, runtime.image_key)
    content = file_hash(Path(weights)) if weights and Path(weights).is_file() else None
    asked = {
        "settings": settings.to_dict(),
        "folder": str(Path(folder).resolve()),
        "encoder": encoder,
        "encoder_options": encoder_options,
        "weights": [weights, weights_prefix, content],
        "preprocessing": preprocessing.to_dict(),
    }
    run = ResumableFolder(where, asked)

    fronts = where / "fronts"  # checkpoints
    if (where / "model").is_dir():
        c = load(where / "model", device=settings.device, trust=spec.name, compile=runtime.compile)
        c.set_params(runtime__num_workers=runtime.num_workers, runtime__progress=runtime.progress)
    else:
        if settings.front.kind == "auto" and settings.front.folder is None:
            settings = settings.nested(front={"folder": str(fronts)})
        c = ExitClusterer(spec, **settings.parameters(), preprocessing=preprocessing)
        c.fit(images, images.targets if settings.clusters.supervised else None)
        run.note("model", images)
        c.save(where / "model")
        list_skipped(c.skipped_, images.paths)
    shutil.rmtree(fronts, ignore_errors=True)
    print(f"{fit_summary(c.model_)}\n")

    model = c.model_.hashes()
    if not (run.is_of("labels", images, model) and (where / "labels.csv").is_file()):
        _, summary = label_images(c, images, Path(folder), where / "labels.csv")
        print(f"{summary}\n")
        run.note("labels", images, model)
    labels = labels_in(where / "labels.csv")
    written = ["report.html", "labels.csv", "report.json", "model"]
    if importlib.util.find_spec("pyarrow"):
        as_parquet(where / "labels.csv", where / "labels.parquet")
        written.insert(2, "labels.parquet")
    evaluation, sample = evaluate_held_out(c, images, MOST)
    which = "held out from fitting" if settings.calibration.holdout else "that were fitted"
    which = which if run.is_of("model", images) else "of a folder that changed since the fit"
    print(f"{evaluation.n} images {which}:\n{evaluation_report(evaluation, c.certificate_)}")
    write_json(where / "report.json", evaluation.to_dict() | {"certificate": c.certificate_.to_dict()})
    write_report(where / "report.html", c.model_, sample, evaluation, labels)
    print(f"\nwritten to {out}: {', '.join(written)}")
