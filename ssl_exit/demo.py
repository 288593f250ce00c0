"""The demonstration: scikit-learn's handwritten digits, an encoder trained without labels, early exits."""

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import save_file
from torch import Tensor, nn

from ssl_exit.clusterer import ExitClusterer
from ssl_exit.data.pixels import PixelsInMemory, digits_pixels
from ssl_exit.data.preprocessing import Preprocessing
from ssl_exit.data.views import DrawingViews
from ssl_exit.encoders.build import EncoderSpec
from ssl_exit.encoders.tapped import TappedEncoder
from ssl_exit.labels import write_labels
from ssl_exit.measure.evaluation import Evaluation
from ssl_exit.report.plots import plot_exits
from ssl_exit.report.tables import exit_table, summary
from ssl_exit.storage import whole_file
from ssl_exit.training.contrastive import SimCLR
from ssl_exit.training.module import Optimization
from ssl_exit.training.run import seeded, train

SHARES = (0.40, 0.35)  # of the images, for fit and for calibration; the rest is the test part
PREPROCESSING = Preprocessing(size=8, mean=(0.0,), std=(1.0,))
TIMED = 5  # evaluations, of which the median time counts: the test part takes a fraction of a second


def digits_encoder() -> nn.Module:
    """Eight 3x3 convolutions with 32, 64 and 128 channels: (N, 1, 8, 8) -> (N, 128)."""

    encoder = nn.Sequential()
    channels = 1
    for i, (out, stride) in enumerate([(32, 1)] * 3 + [(64, 2), (64, 1), (64, 1), (128, 2), (128, 1)], start=1):
        block = nn.Sequential()
        block.add_module("conv", nn.Conv2d(channels, out, 3, stride, 1, bias=False))
        block.add_module("norm", nn.BatchNorm2d(out))
        block.add_module("relu", nn.ReLU())
        encoder.add_module(f"block{i}", block)
        channels = out
    encoder.add_module("pool", nn.AdaptiveAvgPool2d(1))
    encoder.add_module("flatten", nn.Flatten())
    return encoder


def run_demo(out: Path | None, seed: int, epochs: int, progress: bool = True) -> dict[str, Any]:
    """Train, fit, calibrate, cluster the test part with early exits; print a report and return it.

    Args:
        out: a folder for the model, labels.csv, report.json and exits.png; None writes nothing.
        seed: of the split, the training and the clustering.
        epochs: of SimCLR training.
        progress: show progress bars on a terminal.
    """
    start = time.perf_counter()
    digits = digits_pixels()
    images, targets = digits.images, digits.targets
    assert targets is not None
    order = np.random.default_rng(seed).permutation(len(images))
    fit, calibration, test = np.split(order, np.cumsum([round(s * len(images)) for s in SHARES]))
    print(f"{len(images)} handwritten digits: {len(fit)} to fit, {len(calibration)} to calibrate, {len(test)} to test")

    with seeded(seed):
        encoder = digits_encoder()
        tapped = TappedEncoder.build(encoder, "auto", images[:1])
        how = Optimization("adamw", learning_rate=2e-3, weight_decay=1e-4, schedule="one_cycle")
        training = SimCLR(tapped, DrawingViews(), PREPROCESSING, how, temperature=0.2, hidden=128, projection=64)
    parts = PixelsInMemory(images[fit])
    train(training, parts, epochs=epochs, batch_size=128, precision="32-true", seed=seed, progress=progress)
    with tempfile.TemporaryDirectory() as scratch:
        weights = Path(scratch) / "encoder.safetensors"
        save_file(encoder.state_dict(), weights)
        clusterer = ExitClusterer(
            EncoderSpec("ssl_exit.demo:digits_encoder", str(weights)),
            n_clusters=10,
            max_disagreement=0.02,
            preprocessing=PREPROCESSING,
            holdout=0,
            random_state=seed,
            progress=progress,
        ).fit(images[fit])
    clusterer.calibrate(images[calibration])
    found = [clusterer.evaluate(images[test], targets[test]) for _ in range(TIMED)]
    found.sort(key=lambda one: one.cost_time)
    evaluation = found[TIMED // 2]
    seconds = time.perf_counter() - start
    print(f"\n{exit_table(evaluation)}\n\n{summary(evaluation)}\ncertificate               {clusterer.certificate_}")
    report = evaluation.to_dict() | {
        "seconds": seconds,
        "seed": seed,
        "certificate": clusterer.certificate_.to_dict(),
    }
    if out is not None:
        _write(out, clusterer, evaluation, images[test], test, report)
        print(f"\nwritten to {out}: model, labels.csv, report.json, exits.png")
    return report


def _write(
    out: Path, clusterer: ExitClusterer, evaluation: Evaluation, images: Tensor, positions: np.ndarray, report: dict
) -> None:
    out.mkdir(parents=True, exist_ok=True)
    clusterer.save(out / "model")
    names = [f"digit {i}" for i in positions]
    write_labels(out / "labels.csv", names, evaluation.result, clusterer.exit_names_)
    with whole_file(out / "report.json") as draft:
        draft.write_text(json.dumps(report, indent=1) + "\n")
    title = (
        f"scikit-learn digits, {evaluation.n} test images: agreement {evaluation.agreement:.3f} "
        f"at cost {evaluation.cost_macs:.3f}"
    )
    with whole_file(out / "exits.png") as draft:
        plot_exits(draft, evaluation, images[:, 0].numpy(), clusterer.trade_off(images), title)
