"""What every benchmark shares: the machine, the images, the encoders, and where figures go."""

import json
import platform
import statistics
import tarfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ssl_exit import EncoderSpec, ExitClusterer, Preprocessing
from ssl_exit.data.image_files import FolderImages
from ssl_exit.settings import Settings

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
RESULTS = ROOT / "benchmarks" / "results"
PREPROCESSING = {
    "supervised": Preprocessing(32, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "simclr": Preprocessing(32, (0.491, 0.482, 0.447), (0.247, 0.243, 0.262)),
}


def machine() -> dict[str, Any]:
    """The machine and the versions behind a figure."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": model[0] if model else platform.processor(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "torchvision", "faiss-cpu", "numpy", "ssl-exit")},
    }


def cifar_folder() -> Path:
    """CIFAR-10 as JPEG files, unpacked once into data/ (which git ignores): cifar10/{train,test}/CLASS/NNNN.jpg."""
    folder = ROOT / "data" / "cifar10"
    if not folder.is_dir():
        archive = SHARED / "data" / "cifar10.tar.xz"
        if not archive.is_file():
            raise SystemExit(f"no CIFAR-10: expected the folder {folder} (train and test, one sub-folder a class)")
        with tarfile.open(archive) as tar:
            tar.extractall(folder.parent, filter="data")
    return folder


def cifar(part: str) -> tuple[torch.Tensor, np.ndarray]:
    """Pixels, (N, 3, 32, 32) uint8, and classes, (N,), of "train" or "test"; kept decoded in data/."""
    cache = ROOT / "data" / f"cifar10-{part}.npz"
    if not cache.is_file():
        folder = FolderImages(cifar_folder() / part, PREPROCESSING["simclr"])
        pixels = np.stack([np.asarray(Image.open(folder.folder / path)) for path in folder.paths])
        np.savez(cache, pixels=pixels.transpose(0, 3, 1, 2), targets=folder.targets)
    stored = np.load(cache)
    return torch.from_numpy(stored["pixels"]), stored["targets"]


def encoder(name: str) -> EncoderSpec:
    """A frozen ResNet-20: "supervised" or "simclr"."""
    weights = SHARED / "weights" / f"resnet20_cifar10_{name}.safetensors"
    if not weights.is_file():
        raise SystemExit(f"no weights: expected {weights}")
    return EncoderSpec("resnet20_cifar", str(weights))


def clusterer(network: Any, preprocessing: Preprocessing | None = None, **flat: Any) -> ExitClusterer:
    """An ExitClusterer from parameters named as on the command line, without progress bars."""
    settings = Settings.from_flat({"progress": False} | flat)
    return ExitClusterer(network, **settings.parameters(), preprocessing=preprocessing)


def spread(values: list[float]) -> dict[str, float]:
    """Median, least and most of repeated measurements."""
    return {"median": statistics.median(values), "least": min(values), "most": max(values), "n": len(values)}


def report(name: str, figures: Any) -> None:
    """Print the machine and write the figures to benchmarks/results/NAME.json."""
    RESULTS.mkdir(exist_ok=True)
    content = {"machine": machine(), "figures": figures}
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
    print(f"\n{json.dumps(content['machine'])}\nwritten to benchmarks/results/{name}.json")
