"""ssl-exit fit"""

from pathlib import Path
from typing import Any

from ssl_exit.settings import Settings

TIMED = 1_024  # images held out from fitting on which early exit and the full encoder are timed at the end


def fit(
    encoder: str,
    data: str,
    out: str,
    settings: Settings,
    weights: str | None = None,
    weights_prefix: str | None = None,
    encoder_options: dict[str, Any] | None = None,
    size: int | None = None,
    crop: float | None = None,
    mean: list[float] | None = None,
    std: list[float] | None = None,
) -> None:
    """Fit clusters, exits and thresholds to a folder of unlabelled images, and save the model.

    Args:
        encoder: a torchvision architecture, timm:NAME, transformers:FOLDER (or a name on the hub), resnet20_cifar,
            resnet56_cifar, or module:function (in the current folder or on the Python path).
        data: folder of images, searched recursively; labels are used in the supervised mode only, where sub-folders
            are classes.
        out: folder for the model.
        settings: all parameters.
        weights: weights file (.safetensors, .pt, .pth, .ckpt), or DEFAULT to download; transformers: has its own.
        weights_prefix: of the encoder's keys in the weights file, such as teacher.backbone.; found if not set.
        encoder_options: arguments of the architecture, such as --encoder-options.img_size 224.
        size: height and width in pixels of what the encoder sees; like crop, mean and std, if not set, that of the
            training where the weights name it (those that `train` wrote, and DEFAULT), else 224 (1, ImageNet's).
        crop: share of the shorter side kept by the centre crop.
        mean: per channel, of pixels in [0, 1]; one entry for grey images.
        std: per channel, of pixels in [0, 1].
    """
    from ssl_exit.cli.common import encoder_spec, evaluate_held_out, list_skipped, preprocessing_for
    from ssl_exit.clusterer import ExitClusterer
    from ssl_exit.data.images import open_files
    from ssl_exit.report.tables import fit_summary
    from ssl_exit.storage import check_model_folder

    spec = encoder_spec(encoder, weights, encoder_options, weights_prefix)
    check_model_folder(Path(out))  # before hours of work, not after
    preprocessing = preprocessing_for(spec, size=size, mean=mean, std=std, crop=crop)
    c = ExitClusterer(spec, **settings.parameters(), preprocessing=preprocessing)
    images = open_files(Path(data), preprocessing, settings.runtime.max_pixels, settings.runtime.image_key)
    c.fit(images, images.targets if settings.clusters.supervised else None)
    c.save(out)
    list_skipped(c.skipped_, images.paths)
    print(f"{fit_summary(c.model_)}\nmodel written to {out}")
    evaluation, _ = evaluate_held_out(c, images, TIMED)
    print(evaluation.verdict)
