"""ssl-exit train"""

from pathlib import Path
from typing import Any

from ssl_exit.settings import Method, Optimization, TrainingRun

NOT_COMPARED = ("out", "resume")  # with those of an earlier run that is resumed


def train(
    encoder: str,
    data: str,
    out: str,
    optimization: Optimization,
    run: TrainingRun,
    method: Method = "simclr",
    options: dict[str, Any] | None = None,
    weights: str | None = None,
    views: str = "auto",
    exits: str | list[str] = "auto",
    descriptor: str = "auto",
    size: int = 32,
    crop: float = 1.0,
    mean: list[float] | None = None,
    std: list[float] | None = None,
    resume: bool = False,
) -> None:
    """Train an encoder on a folder of images without labels, with its exits in mind; write out/encoder.safetensors.

    Args:
        encoder: a torchvision architecture, timm:NAME, resnet18_cifar, resnet20_cifar, ..., or module:function.
        data: folder of images, searched recursively; or digits, scikit-learn's.
        out: folder for the encoder, checkpoints and logs.
        optimization: how parameters are updated.
        run: how the training is run.
        method: simclr, moco, or distill (self-distillation: exits learn the final clusters).
        options: of the method, such as --options.temperature 0.2 or --options.exit_weight 1 (see docs/training.md).
        weights: weights file to start from.
        views: simclr, moco, light (crops, flips, brightness), drawing, or auto: what suits the method.
        exits: "auto", or names of exit points; what the losses at the exits look at.
        descriptor: auto, average, pyramid or tokens.
        size: height and width in pixels of what the encoder sees.
        crop: share of the shorter side kept when images are decoded.
        mean: per channel, of pixels in [0, 1]; one entry for grey images. ImageNet's if not set.
        std: per channel, of pixels in [0, 1]. ImageNet's if not set.
        resume: continue from the newest checkpoint in out.
    """
    settings = {k: v for k, v in locals().items() if k not in (*NOT_COMPARED, "optimization", "run")}
    import json
    from dataclasses import asdict

    import torch

    from ssl_exit.data.preprocessing import METADATA, Preprocessing
    from ssl_exit.encoders.build import EncoderSpec
    from ssl_exit.encoders.tapped import TappedEncoder
    from ssl_exit.files import atomic_file, check_file, write_tensors
    from ssl_exit.training.loader import digits_images
    from ssl_exit.training.methods import build_training
    from ssl_exit.training.run import seeded
    from ssl_exit.training.run import train as run_training

    statistics = {name: tuple(value) for name, value in (("mean", mean), ("std", std)) if value is not None}
    preprocessing = Preprocessing(size, crop=crop, **statistics)
    file = Path(out) / "encoder.safetensors"
    check_file(file)
    with seeded(run.seed):
        module = EncoderSpec(encoder, weights).build()
        example = torch.zeros(1, len(preprocessing.mean), size, size)
        tapped = TappedEncoder.build(module, exits, example, descriptor=descriptor)
        training = build_training(
            method, tapped, preprocessing, views=views, optimization=optimization, options=options
        )
    images = digits_images() if data == "digits" else data
    run_training(training, images, out=Path(out), resume=resume, settings=settings, **asdict(run))
    if not training.trainer.is_global_zero:
        return
    with atomic_file(file) as draft:
        write_tensors(draft, module.state_dict(), {METADATA: json.dumps(preprocessing.to_dict())})
    print(f"{run.epochs} epochs; encoder written to {file}")
