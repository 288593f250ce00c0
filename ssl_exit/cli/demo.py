"""ssl-exit demo: scikit-learn's handwritten digits, an encoder trained without labels, early exits."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

SHARES = (0.35, 0.45)  # of the images, for fit and for calibration; the rest is the test part
TIMED = 5  # evaluations, of which the median time counts: the test part takes a fraction of a second


def demo(out: str | None = None, seed: int = 0, epochs: int = 60) -> None:
    """Train an encoder on handwritten digits without labels and cluster unseen ones with early exits.

    Needs no network and no GPU; takes about half a minute.

    Args:
        out: folder to write the model, labels.csv, report.json and exits.png into.
        seed: of the split, the training and the clustering.
        epochs: passes over the images in training.
    """
    run_demo(Path(out) if out else None, seed, epochs)


def run_demo(out: Path | None, seed: int, epochs: int, progress: bool = True) -> dict[str, Any]:
    """Train, fit, calibrate, cluster the test part with early exits; print a report and return it.

    Args:
        out: a folder for the model, labels.csv, report.json and exits.png; None writes nothing.
        seed: of the split, the training and the clustering.
        epochs: of SimCLR training.
        progress: show progress bars on a terminal.
    """
    import tempfile
    import time

    import numpy as np

    from ssl_exit import Calibration, EncoderSpec, ExitClusterer, Preprocessing, Runtime
    from ssl_exit.cli.common import write_json
    from ssl_exit.files import atomic_file, write_tensors
    from ssl_exit.report.label_file import write_labels
    from ssl_exit.report.plots import plot_exits
    from ssl_exit.report.tables import evaluation_report
    from ssl_exit.training.loader import digits_images

    start = time.perf_counter()
    digits = digits_images()
    images, targets = digits.images, digits.targets
    assert targets is not None
    order = np.random.default_rng(seed).permutation(len(images))
    fit, calibration, test = np.split(order, np.cumsum([round(s * len(images)) for s in SHARES]))
    print(f"{len(images)} handwritten digits: {len(fit)} to fit, {len(calibration)} to calibrate, {len(test)} to test")

    encoder = train_encoder(images[fit], seed, epochs, progress)
    with tempfile.TemporaryDirectory() as scratch:
        weights = Path(scratch) / "encoder.safetensors"
        write_tensors(weights, encoder.state_dict())
        c = ExitClusterer(
            EncoderSpec("digits_cnn", str(weights)),
            n_clusters=10,
            max_disagreement=0.02,
            random_state=seed,
            calibration=Calibration(holdout=0),
            runtime=Runtime(progress=progress),
            preprocessing=Preprocessing(size=8, mean=(0.0,), std=(1.0,)),
        ).fit(images[fit])
    c.calibrate(images[calibration])
    evaluations = [c.evaluate(images[test], targets[test]) for _ in range(TIMED)]
    evaluation = sorted(evaluations, key=lambda one: one.cost_time)[TIMED // 2]
    seconds = time.perf_counter() - start
    print(f"\n{evaluation_report(evaluation, c.certificate_)}")
    report = evaluation.to_dict() | {"seconds": seconds, "seed": seed, "certificate": c.certificate_.to_dict()}
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        c.save(out / "model")
        write_labels(out / "labels.csv", [f"digit {i}" for i in test], evaluation.result, c.exit_names_)
        write_json(out / "report.json", report)
        title = (
            f"scikit-learn digits, {evaluation.n} test images: agreement {evaluation.agreement:.3f} "
            f"at cost {evaluation.cost_macs:.3f}"
        )
        with atomic_file(out / "exits.png") as draft:
            plot_exits(draft, evaluation, images[test, 0].numpy(), c.trade_off(images[test]), title)
        print(f"\nwritten to {out}: model, labels.csv, report.json, exits.png")
    return report


def train_encoder(images: "Tensor", seed: int, epochs: int, progress: bool) -> "nn.Module":
    """Train the small encoder on handwritten digits, (N, 1, 8, 8), by SimCLR."""
    from ssl_exit import Preprocessing
    from ssl_exit.encoders.small import digits_encoder
    from ssl_exit.encoders.tapped import TappedEncoder
    from ssl_exit.training import Optimization, SimCLR, train
    from ssl_exit.training.run import seeded
    from ssl_exit.training.views import DrawingViews

    preprocessing = Preprocessing(size=8, mean=(0.0,), std=(1.0,))
    with seeded(seed):
        encoder = digits_encoder()
        tapped = TappedEncoder.build(encoder, "auto", images[:1])
        how = Optimization("adamw", learning_rate=2e-3, weight_decay=1e-4, schedule="one_cycle")
        training = SimCLR(tapped, DrawingViews(), preprocessing, how, temperature=0.2, hidden=128, projection=64)
    options: dict[str, Any] = {"epochs": epochs, "batch_size": 128, "precision": "32-true", "seed": seed}
    train(training, images, **options, progress=progress)
    return encoder
