"""A front before a frozen encoder, against the honest alternatives: what agreement, accuracy and time each costs.

    uv run python benchmarks/front.py --fit      # hours; keeps models in data/fronts, and goes on where it stopped
    uv run python benchmarks/front.py            # minutes: evaluates them, alone on the machine

Frozen ResNet-20 (SimCLR and supervised weights; CIFAR-10 re-encoded as JPEG; final clusters of its features, no
labels). For each seed 40,000 training images to fit and 10,000 for thresholds and certificate (disagreement <= 2 %,
confidence 95 %); all figures are on the 10,000 test images.

    rule       exits in the encoder, the default rule
    mlp        exits in the encoder, trained heads, 20 passes
    front      a front alone, the encoder one stage behind it
    matched    the same, taught what the encoder answers to every view (`Front(match=True)`)
    two        fronts of 2 % and 8 % of the multiply-adds in a row
    joined     a front and three exits in the encoder, which see its features
    student    a front of 38 % of the multiply-adds, from which all images leave: a static model of that cost

Printed: the front's multiply-adds and time / the encoder's; certified agreement and cost; realised time / full encoder
in float32 and bfloat16, and what the stage times predict; cost at 99, 98, 95 and 90 % agreement (the cheapest setting
of the threshold path that reaches it on the test images); agreement and cost if all images left at the front; ACC;
seconds of teaching, and after how many images they are paid for. Rows of arms and seeds that are not evaluated
stay in the results as they are.
"""

import argparse
import json
import pickle
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from common import PREPROCESSING, RESULTS, ROOT, cifar, clusterer, encoder, report, spread

from ssl_exit import ExitClusterer
from ssl_exit.cascade.memory import kept_memory
from ssl_exit.data.images import Batch, open_images
from ssl_exit.files import atomic_file
from ssl_exit.measure.metrics import clustering_accuracy
from ssl_exit.model import Model
from ssl_exit.report.tables import text_table

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ASKED = (0.99, 0.98, 0.95, 0.90)
INSIDE = ["layer1.2", "layer2.2", "layer3.1"]
ARMS: dict[str, dict[str, Any]] = {
    "rule": {},
    "mlp": {"rule": "mlp", "rule_options": {"epochs": 20}},
    "front": {"front": "auto"},
    "matched": {"front": "auto", "front_match": True},
    "two": {"front": "auto", "front_macs": [0.02, 0.08], "front_time": 0.15},
    "joined": {"front": "auto", "exits": INSIDE},
    "student": {"front": "auto", "front_macs": 0.38, "front_time": 0.6},
}
REPEATS, TIMED = 3, 4000  # of the test images, with the first seed and number of clusters
KEPT = ROOT / "data" / "fronts"


def stored(name: str, arm: str, k: int, seed: int, more: dict[str, Any], fit: bool) -> Model | None:
    """The model, fitted where it is missing and `fit` is set."""
    label = "-".join([name, arm, str(k), str(seed), *(f"{key}={value}" for key, value in more.items())])
    file = KEPT / f"{label}.pkl"
    if not file.is_file() and fit:
        KEPT.mkdir(parents=True, exist_ok=True)
        start = time.perf_counter()
        options = ARMS[arm] | {"n_clusters": k, "seed": seed} | (more if "front" in ARMS[arm] else {})
        model = clusterer(encoder(name), PREPROCESSING[name], **options).fit(cifar("train")[0]).model_
        print(f"{label}: {time.perf_counter() - start:.0f} s; {model.certificate}", flush=True)
        with atomic_file(file) as draft:
            draft.write_bytes(pickle.dumps(model))
    return pickle.loads(file.read_bytes()) if file.is_file() else None


def in_precision(model: Model, precision: str) -> ExitClusterer:
    """A clusterer that holds the model; its certificate is about float32 alone."""
    about, tensors = model.state()
    settings = model.settings.nested(runtime={"precision": precision})
    c = ExitClusterer(model.encoder, **settings.parameters(), preprocessing=model.preprocessing)
    c._hold(Model.from_state(model.encoder, about, tensors, settings))
    return c


def evaluated(model: Model, images: torch.Tensor, targets: np.ndarray, timed: bool) -> dict[str, Any]:
    """One row of the table, as numbers."""
    c = in_precision(model, "float32")
    result, full = c.run(images), c.predict_full(images)
    costs, agreements = c.trade_off(images)
    cascade, fronts = model.cascade, len(model.fronts)
    times = cascade.times
    assert times is not None
    figures: dict[str, Any] = {
        "agreement": float((result.labels == full).mean()),
        "cost": float(result.cost.mean()),
        "acc": clustering_accuracy(result.labels, targets),
        "acc full": clustering_accuracy(full, targets),
        "at": {str(asked): float(costs[agreements >= asked].min()) for asked in ASKED},
        "teaching": sum(one.seconds for one in model.provenance.teaching),
        "epochs": [one.epochs for one in model.provenance.teaching],
        "front macs": float(cascade.costs[fronts - 1]) if fronts else None,
        "front time": float(times.exit_seconds[:fronts].sum() / times.stage_seconds.sum()) if fronts else None,
    }
    if fronts:
        leaving = cascade.at(np.vstack([np.zeros_like(cascade.thresholds[:1]), cascade.thresholds[1:]]))
        figures["all leave"] = float((replace(model, cascade=leaving).run(batches(images, model), len(images)).labels
                                      == full).mean())  # fmt: skip
    for precision in ("float32", "bfloat16") if timed else ():
        runs = [in_precision(model, precision).evaluate(images[:TIMED]) for _ in range(REPEATS)]
        figures[precision] = {
            "time": spread([run.cost_time for run in runs]),
            "predicted / realised": spread([run.cost_time_predicted / run.cost_time for run in runs]),
            "break-even": spread([min(run.break_even, 1e12) for run in runs]),
        }
    return figures


def batches(images: torch.Tensor, model: Model) -> Iterator[Batch]:
    """As the model takes them."""
    source = open_images(images, model.preprocessing)
    return source.batches(np.arange(len(images)), model.settings.batch_size)


def mean_pm(values: list[float], digits: int = 3) -> str:
    """Mean and, of several, standard deviation."""
    mean = f"{np.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ±{np.std(values, ddof=1):.{digits}f}"


def row(label: str, runs: list[dict[str, Any]]) -> tuple[str, ...]:
    """Means over seeds; times of those that were timed."""

    def of(*path: str, digits: int = 3) -> str:
        values = []
        for one in runs:
            value: Any = one
            for key in path:
                value = None if value is None else value.get(key)
            values.append(value)
        known = [value for value in values if value is not None]
        return mean_pm(known, digits) if known else "-"

    taught = runs[0]["teaching"] > 0
    return (
        label,
        str(len(runs)),
        of("front macs"),
        of("front time"),
        of("agreement", digits=4),
        of("cost"),
        of("float32", "time", "median"),
        of("float32", "predicted / realised", "median"),
        of("bfloat16", "time", "median"),
        *(of("at", str(asked)) for asked in ASKED),
        of("all leave"),
        of("acc"),
        of("acc full"),
        of("teaching", digits=0) if taught else "-",
        of("float32", "break-even", "median", digits=0) if taught else "-",
    )


HEAD = ("", "seeds", "front macs", "front time", "agreement", "cost", "time f32", "pred./real.", "time bf16",
        *(f"at {asked:.0%}" for asked in ASKED), "all leave", "ACC", "ACC full", "teaching s",
        "break-even")  # fmt: skip


def draw(figures: dict[str, dict[str, list[dict[str, Any]]]], file: Path) -> None:
    """Cost over agreement of every arm."""
    fig, axes = plt.subplots(1, len(figures), figsize=(5.5 * len(figures), 4), squeeze=False)
    for axis, (name, arms) in zip(axes[0], figures.items(), strict=True):
        for arm, runs in arms.items():
            costs = [float(np.mean([run["at"][str(asked)] for run in runs])) for asked in ASKED]
            axis.plot([100 * asked for asked in ASKED], costs, marker="o", label=arm)
        axis.set(title=name, xlabel="agreement with the full encoder, %", ylabel="multiply-adds / full encoder")
        axis.set_ylim(0, 1)
        axis.grid(alpha=0.3)
        axis.legend()
    fig.tight_layout()
    fig.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fit", action="store_true", help="fit what is missing, and evaluate nothing")
    parser.add_argument("--encoders", nargs="+", default=["simclr", "supervised"])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--clusters", nargs="+", type=int, default=[10, 100])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--front-epochs", type=int, help="instead of the default")
    args = parser.parse_args()
    more = {} if args.front_epochs is None else {"front_epochs": args.front_epochs}
    images, targets = cifar("test")
    file = RESULTS / "front.json"
    before = json.loads(file.read_text())["figures"] if file.is_file() else {}
    figures: dict[str, dict[str, list[dict[str, Any]]]] = {}
    warnings.filterwarnings("ignore", message="no image may exit early")
    for seed in args.seeds:
        for k in args.clusters:
            for name in args.encoders:
                for arm in args.arms:
                    model = stored(name, arm, k, seed, more, args.fit)
                    if model is None or args.fit:
                        continue
                    with kept_memory():
                        one = evaluated(model, images, targets, timed=(seed, k) == (args.seeds[0], args.clusters[0]))
                    figures.setdefault(f"{name}, K = {k}", {}).setdefault(arm, []).append(one | {"seed": seed})
                    print(name, k, seed, arm, f"{one['agreement']:.4f} {one['cost']:.3f}", flush=True)
    if not args.fit:
        for name, arms in before.items():
            for arm, rows in arms.items():
                ours = figures.setdefault(name, {}).setdefault(arm, [])
                ours += [one for one in rows if one["seed"] not in {new["seed"] for new in ours}]
                ours.sort(key=lambda one: one["seed"])
        for name, arms in figures.items():
            print(f"\n{name}\n{text_table(HEAD, [row(arm, runs) for arm, runs in arms.items()])}")
        report("front", figures)
        draw(figures, RESULTS / "front.png")


if __name__ == "__main__":
    main()
