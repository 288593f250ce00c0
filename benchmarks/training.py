"""How much faster is training here than the ordinary pipeline, and are the features as good?

    uv run python benchmarks/training.py

SimCLR, the same ResNet-20, batch size, optimiser and number of images, side by side and in turn:

    ordinary             lightly's SimCLRTransform on PIL images in a DataLoader with worker processes, float32
    ssl_exit             `train`: views drawn in batches on the training device, channels_last, bfloat16 where
                         hardware has it
    ssl_exit, compiled   with `compile=True`

Each is trained for `--epochs` passes over `--images` CIFAR-10 training images held in memory. Printed are images a
second in all passes but the first, the ratio to the ordinary pipeline's of the same repeat, the median of `--repeats`
and their range; and seconds that the first pass takes beyond the others (the DataLoader's workers, compilation, whose
results torch keeps on disk: the most of the repeats is what a first run pays). Neighbours' accuracy (k = 200, T = 0.1;
all training images as the bank, the test images as queries) of both, for as many seeds. Rows between the two show what
each step is worth.
"""

import argparse
import time
from collections.abc import Iterator

import numpy as np
import torch
from common import PREPROCESSING, cifar, report, spread
from lightly.loss import NTXentLoss
from lightly.models.modules import SimCLRProjectionHead
from lightly.transforms.simclr_transform import SimCLRTransform
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ssl_exit.encoders.build import EncoderSpec
from ssl_exit.encoders.tapped import TappedEncoder
from ssl_exit.report.tables import text_table
from ssl_exit.training import Optimization, build_training, train
from ssl_exit.training.monitor import knn_accuracy_predictions
from ssl_exit.training.run import best_precision

BATCH, TEMPERATURE, HIDDEN, RATE = 256, 0.2, 256, 0.4
HOW = PREPROCESSING["simclr"]


class OrdinaryViews(Dataset):
    """Two views of each image by lightly's transform, one image at a time."""

    def __init__(self, pixels: Tensor) -> None:
        self.images = [Image.fromarray(x) for x in pixels.permute(0, 2, 3, 1).numpy()]
        normalize = {"mean": list(HOW.mean), "std": list(HOW.std)}
        self.transform = SimCLRTransform(32, cj_strength=0.5, gaussian_blur=0.0, normalize=normalize)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> list[Tensor]:
        return self.transform(self.images[index])


def ordinary(encoder: nn.Module, pixels: Tensor, epochs: int, seed: int, device: str, workers: int) -> list[float]:
    """The loop of lightly's examples; the time at the start and after every epoch."""
    stamps = [time.perf_counter()]
    torch.manual_seed(seed)
    model = nn.Sequential(encoder, SimCLRProjectionHead(64, HIDDEN, 128)).to(device).train()
    loader = DataLoader(
        OrdinaryViews(pixels), BATCH, shuffle=True, drop_last=True, num_workers=workers, persistent_workers=True
    )
    criterion = NTXentLoss(TEMPERATURE)
    optimizer = torch.optim.SGD(model.parameters(), RATE, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=epochs * len(loader))
    for _ in range(epochs):
        for x0, x1 in loader:
            loss = criterion(model(x0.to(device)), model(x1.to(device)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        if device == "cuda":
            torch.cuda.synchronize()
        stamps.append(time.perf_counter())
    encoder.cpu().eval()
    return stamps


def ours(
    encoder: nn.Module, pixels: Tensor, epochs: int, seed: int, device: str, precision: str, compile: bool
) -> list[float]:
    """`train`; the time at the start and after every epoch."""
    stamps = [time.perf_counter()]
    torch.manual_seed(seed)
    tapped = TappedEncoder.build(encoder, "auto", torch.zeros(1, 3, 32, 32))
    training = build_training(
        "simclr",
        tapped,
        HOW,
        optimization=Optimization("sgd", RATE, schedule="one_cycle"),
        options={"temperature": TEMPERATURE, "hidden": HIDDEN},
    )
    training.on_train_epoch_end = lambda: stamps.append(time.perf_counter())  # the loss was looked at just before
    train(
        training,
        pixels,
        epochs=epochs,
        batch_size=BATCH,
        precision=precision,
        compile=compile,
        device=device,
        seed=seed,
    )
    return stamps


def neighbours(encoder: nn.Module, device: str) -> float:
    """Accuracy on the test images."""

    def features(part: str) -> tuple[Tensor, np.ndarray]:
        pixels, targets = cifar(part)
        with torch.inference_mode():
            found = [encoder.to(device)(HOW(x).to(device)).float() for x in pixels.split(500)]
        return torch.cat(found), targets

    (bank, classes), (queries, targets) = features("train"), features("test")
    return float((knn_accuracy_predictions(bank, queries, classes) == targets).mean())


def arms(device: str, workers: int, few: bool) -> Iterator[tuple[str, object]]:
    yield "ordinary", lambda *a: ordinary(*a, device, workers)
    if not few:
        yield "ssl_exit, float32", lambda *a: ours(*a, device, "32-true", False)
        yield "ssl_exit", lambda *a: ours(*a, device, best_precision(device), False)
    yield "ssl_exit, compiled", lambda *a: ours(*a, device, best_precision(device), True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--encoder", default="resnet20_cifar")
    parser.add_argument("--few", action="store_true", help="only the first and the last row")
    args = parser.parse_args()
    pixels = cifar("train")[0]
    pixels = pixels[torch.from_numpy(np.random.default_rng(0).permutation(len(pixels))[: args.images])].contiguous()
    seen: dict[str, dict[str, list[float]]] = {}
    for repeat in range(args.repeats):
        for name, run in arms(args.device, args.workers, args.few):
            torch.manual_seed(repeat)
            encoder = EncoderSpec(args.encoder).build()
            first, *rest = np.diff(run(encoder, pixels, args.epochs, repeat))  # type: ignore[operator]
            row = seen.setdefault(name, {"images_per_second": [], "start": [], "knn": []})
            row["images_per_second"].append(args.images / float(np.mean(rest)))
            row["start"].append(float(first - np.mean(rest)))
            row["knn"].append(neighbours(encoder, args.device))
            print(name, f"{row['images_per_second'][-1]:.0f} images/s, kNN {row['knn'][-1]:.4f}", flush=True)
    base = seen["ordinary"]["images_per_second"]
    figures = []
    for name, row in seen.items():
        ratios = [a / b for a, b in zip(row["images_per_second"], base, strict=True)]
        figures.append(
            {
                "pipeline": name,
                "images_per_second": spread(row["images_per_second"]),
                "ratio": spread(ratios),
                "start": spread(row["start"]),
                "knn": spread(row["knn"]),
                "knn_of_seeds": row["knn"],
            }
        )
    rows = [
        (
            f["pipeline"],
            *(f"{f[k]['median']:.{d}f} ({f[k]['least']:.{d}f}-{f[k]['most']:.{d}f})" for k, d in
              (("images_per_second", 0), ("ratio", 2), ("start", 0), ("knn", 4))),
        )
        for f in figures
    ]  # fmt: skip
    print(text_table(("pipeline", "images a second", "ratio", "seconds to start", "kNN accuracy"), rows))
    settings = vars(args) | {"batch_size": BATCH, "precision": best_precision(args.device)}
    report(f"training_{args.device}", {"settings": settings, "rows": figures})


if __name__ == "__main__":
    main()
