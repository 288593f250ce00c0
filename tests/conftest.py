"""Real images and encoders for the tests: handwritten digits everywhere, CIFAR-10 and ResNet-20 where shared."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = (
        "1"  # tests side by side: here and in processes they start; before torch is imported
    )

os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")  # its workers start by this interpreter, at once

import tarfile
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import settings
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor, nn

from ssl_exit import EncoderSpec, ExitClusterer
from ssl_exit.data.images import open_images
from ssl_exit.encoders.small import resnet20_cifar
from ssl_exit.encoders.stages import StagedEncoder, split
from ssl_exit.fitting.record import record
from ssl_exit.settings import Settings, options_of

settings.register_profile("untimed", deadline=None)  # a busy machine is no failure
settings.load_profile("untimed")

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def digits() -> Tensor:
    """(1797, 1, 8, 8) in [0, 1]."""
    return torch.tensor(load_digits().images, dtype=torch.float32)[:, None] / 16


@pytest.fixture(scope="session")
def rgb_digits(digits) -> Tensor:
    """(1000, 3, 32, 32), standardised."""
    large = nn.functional.interpolate(digits[:1000], size=32, mode="bilinear").expand(-1, 3, -1, -1)
    return ((large - large.mean()) / large.std()).contiguous()


@pytest.fixture(scope="session")
def cifar() -> tuple[Tensor, np.ndarray]:
    """CIFAR-10 training images, (2000, 3, 32, 32) uint8, and classes; skips where the archive is absent."""
    archive = SHARED / "data" / "cifar10.tar.xz"
    if not archive.is_file():
        pytest.skip(f"needs {archive.name} in ../shared/data")
    pixels, classes = [], []
    with tarfile.open(archive) as tar:
        for member in tar:
            part, *rest = Path(member.name).parts[-3:]
            if part == "train" and member.isfile() and int(Path(rest[1]).stem) < 200:
                with tar.extractfile(member) as file:
                    pixels.append(np.asarray(Image.open(file)))
                classes.append(rest[0])
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2), np.unique(classes, return_inverse=True)[1]


@pytest.fixture(scope="session")
def simclr_spec() -> EncoderSpec:
    """A frozen SimCLR ResNet-20; skips where the weights are absent."""
    weights = SHARED / "weights" / "resnet20_cifar10_simclr.safetensors"
    if not weights.is_file():
        pytest.skip(f"needs {weights.name} in ../shared/weights")
    return EncoderSpec("resnet20_cifar", str(weights))


def untrained(name: str, images: Tensor) -> nn.Module:
    """An encoder with seeded weights and batch statistics of real images, in eval mode."""
    torch.manual_seed(0)
    if name == "resnet20":
        encoder: nn.Module = resnet20_cifar()
    elif name == "mobilenet":
        encoder = torchvision.models.mobilenet_v3_small()
        encoder.classifier = nn.Identity()
    else:
        encoder = torchvision.models.VisionTransformer(32, 8, 4, 2, 32, 64)
        encoder.heads = nn.Identity()
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # a plain average
    with torch.no_grad():
        for _ in range(5):
            encoder.train()(images[:200])
    return encoder.eval()


def tensors_of(staged: StagedEncoder, images: Tensor) -> list[Tensor]:
    """The tensor at every exit point and, last, the encoder's output."""
    return list(accumulate(staged.stages, lambda x, stage: stage(x), initial=images))[1:]


@pytest.fixture(scope="session", params=["resnet20", "resnet20 alone", "mobilenet", "vit"])
def fitted(request, rgb_digits) -> ExitClusterer:
    """A clusterer fitted to 800 of the rgb_digits, whose test images leave at several exits."""
    name, _, alone = request.param.partition(" ")
    encoder = untrained(name, rgb_digits)
    c = clusterer(
        encoder,
        n_clusters=5,
        exits=[point.name for point in split(encoder, "auto", rgb_digits[:1]).exit_points],  # none is left out
        max_disagreement=0.2,
        confidence=0.5,
        batch_size=64,
        accumulate=not alone,
    ).fit(rgb_digits[:800])
    return leaving_everywhere(c, rgb_digits[:800])


@pytest.fixture
def image_folder(tmp_path, digits) -> Path:
    """60 digits as PNG files, 6 in each of 10 sub-folders."""
    targets = load_digits().target
    for digit in range(10):
        (tmp_path / "images" / str(digit)).mkdir(parents=True)
        for i in np.flatnonzero(targets == digit)[:6]:
            pixels = (digits[i, 0].numpy() * 255).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / str(digit) / f"{i:04d}.png")
    return tmp_path / "images"


def clusterer(encoder, preprocessing=None, **flat) -> ExitClusterer:
    """An ExitClusterer whose parameters are named as on the command line: in tests no group need be spelled out."""
    settings = Settings.from_flat({"device": "cpu", "progress": False} | flat)
    unknown = set(flat) - {option.flag for option in options_of(Settings)}
    assert not unknown, unknown
    return ExitClusterer(encoder, **settings.parameters(), preprocessing=preprocessing)


def leaving_everywhere(c: ExitClusterer, images: Tensor) -> ExitClusterer:
    """With thresholds at which about a quarter of the images that reach an exit leave, unlike ones for each cluster."""
    cascade = c.model_.cascade
    recorded, _ = record(cascade, batches_of(images, 64))
    thresholds, here = np.zeros_like(cascade.thresholds), np.ones(len(images), dtype=bool)
    for e in range(len(thresholds)):
        scores = recorded.scores[:, e]
        usable = scores[here & np.isfinite(scores)]
        least = np.quantile(usable, 0.75) if len(usable) else np.inf
        thresholds[e] = least * (1 - 0.01 * np.arange(thresholds.shape[1]))
        here &= ~(scores >= thresholds[e][recorded.labels[:, e]])
    c.model_ = replace(c.model_, cascade=cascade.at(thresholds))
    return c


def batches_of(images: Tensor, batch_size: int):
    """Batches of a tensor of images, in order."""
    return open_images(images).batches(np.arange(len(images)), batch_size)
