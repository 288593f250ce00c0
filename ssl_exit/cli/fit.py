"""ssl-exit fit"""

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssl_exit.errors import InputError
from ssl_exit.settings import Settings

if TYPE_CHECKING:
    from ssl_exit.data.image_files import ImageFiles
    from ssl_exit.data.preprocessing import Preprocessing
    from ssl_exit.encoders.build import EncoderSpec
    from ssl_exit.fitting.shards import Shard

TIMED = 1_024  # images held out from fitting on which early exit and the full encoder are timed at the end


def fit(
    settings: Settings,
    encoder: str | None = None,
    data: str | None = None,
    out: str | None = None,
    weights: str | None = None,
    weights_prefix: str | None = None,
    encoder_options: dict[str, Any] | None = None,
    size: int | None = None,
    crop: float | None = None,
    mean: list[float] | None = None,
    std: list[float] | None = None,
    part: str | None = None,
    shard: str | None = None,
    merge: list[str] | None = None,
) -> None:
    """Fit clusters, exits and thresholds to a folder of unlabelled images, and save the model.

    Several processes fit together where torchrun starts this command, each on its share of the images; so do several
    jobs that write --part, joined by --merge (docs/scale.md).

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
        part: folder for what this job computes of its images, one of several jobs; it is run again after every merge.
        shard: which share of the images is this job's, such as 2/5, the second of five; all of them if not set.
        merge: folders of the parts of all jobs, which are merged; nothing else is done.
    """
    if merge:
        from ssl_exit.fitting.parts import merge_parts

        print(merge_parts(merge))
        return
    if encoder is None or data is None or out is None:
        raise InputError("fit needs --encoder, --data and --out (or --merge and the folders of parts)")
    from ssl_exit.cli.common import encoder_spec, evaluate_held_out, list_skipped, preprocessing_for
    from ssl_exit.clusterer import ExitClusterer
    from ssl_exit.data.images import open_files
    from ssl_exit.report.tables import fit_summary
    from ssl_exit.storage import check_model_folder

    spec = encoder_spec(encoder, weights, encoder_options, weights_prefix)
    check_model_folder(Path(out))  # before hours of work, not after
    preprocessing = preprocessing_for(spec, size=size, mean=mean, std=std, crop=crop)
    images = open_files(Path(data), preprocessing, settings.runtime.max_pixels, settings.runtime.image_key)
    together = "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1  # as torchrun sets both
    if part or shard or together:
        _fit_shard(spec, preprocessing, settings, images, out, part, shard)
        return
    c = ExitClusterer(spec, **settings.parameters(), preprocessing=preprocessing)
    c.fit(images, images.targets if settings.clusters.supervised else None)
    if settings.front.devices > 1 and int(os.environ.get("LOCAL_RANK", "0")):
        return  # a process that Lightning started to teach the front
    c.save(out)
    list_skipped(c.skipped_, images.paths)
    print(f"{fit_summary(c.model_)}\nmodel written to {out}")
    evaluation, _ = evaluate_held_out(c, images, TIMED)
    print(evaluation.verdict)


def _fit_shard(
    spec: "EncoderSpec",
    preprocessing: "Preprocessing",
    settings: Settings,
    images: "ImageFiles",
    out: str,
    part: str | None,
    share: str | None,
) -> None:
    """One of several jobs or processes; the first one writes the model."""
    from ssl_exit.cli.common import list_skipped
    from ssl_exit.clusterer import ExitClusterer
    from ssl_exit.data.image_files import SomeImages
    from ssl_exit.fitting.parts import PartWritten, StoredShard
    from ssl_exit.report.tables import fit_summary

    shard: Shard
    if part:
        shard, (i, n) = StoredShard(part), _share(share)
    else:
        if share:
            raise InputError("--shard is for jobs that write a --part; processes under torchrun divide images by rank")
        shard, settings = _under_torchrun(settings)
        i, n = shard.rank, int(os.environ["WORLD_SIZE"])
    own = SomeImages(images, range(i, len(images), n))
    c = ExitClusterer(spec, **settings.parameters(), preprocessing=preprocessing)
    try:
        c.fit(own, shard=shard)
    except PartWritten as written:
        print(f"{written}; when all jobs have written theirs, ssl-exit fit --merge FOLDERS, and run this again")
        return
    list_skipped(c.skipped_, own.paths)
    if part or shard.rank == 0:
        c.save(out)
        print(f"{fit_summary(c.model_)}\nmodel written to {out}")


def _share(text: str | None) -> tuple[int, int]:
    """2/5 -> (1, 5); all of it, (0, 1), of None."""
    first, _, last = (text or "1/1").partition("/")
    if not (first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise InputError(f"--shard is a share such as 2/5, the second of five; got {text!r}")
    return int(first) - 1, int(last)


def _under_torchrun(settings: Settings) -> "tuple[Shard, Settings]":
    """This process among those that torchrun started, and settings with a GPU of its own where there is one."""
    import torch

    from ssl_exit.fitting.shards import DistributedShard

    torch.distributed.init_process_group("gloo")
    if settings.device == "auto" and torch.cuda.is_available():
        settings = replace(settings, device=f"cuda:{os.environ.get('LOCAL_RANK', 0)}")
    return DistributedShard(), settings
