"""What early exit saves on a frozen encoder, without a gradient step.

    uv run python benchmarks/frozen.py

Two frozen ResNet-20 (supervised, SimCLR), CIFAR-10 (JPEG), K = 10. Fit on 40,000 training images, thresholds on
the other 10,000, figures on the 10,000 test images. For every wanted agreement: what was reached, cost in
multiply-adds (exits' own included) and in measured time (whole encoder and early exit in turns in one run;
median of five runs). Confidence 0.5 asks for no safety margin and is comparable with other work; 0.95 is the
library's default. Rows "one threshold" use the same centroids with the plain softmax score and a single
threshold for all exits and clusters; rows "e2cm" use unsupervised E2CM on global averages.
"""

import argparse
import warnings

import numpy as np
from common import PREPROCESSING, cifar, encoder, report, spread

from ssl_exit import ExitClusterer
from ssl_exit.exits.thresholds import Recorded, trade_off
from ssl_exit.report.tables import text_table

ASKED = (0.99, 0.98, 0.95)


def one_threshold(clusterer: ExitClusterer, calibration, test, asked: float) -> tuple[float, float]:
    """Agreement and cost on the test images of the lowest single threshold that holds on the calibration images."""
    held, unseen = (plain_scores(clusterer, images) for images in (calibration, test))
    grid = np.unique(np.quantile(held.scores, np.linspace(0, 1, 400)))[::-1]
    path = grid[:, None, None] * np.ones_like(clusterer.cascade_.thresholds.cpu().numpy())
    costs = clusterer.cascade_.costs
    _, agreements = trade_off(path, held, costs)
    passed = np.flatnonzero(np.minimum.accumulate(agreements) >= asked)
    cost, agreement = trade_off(path[passed[-1:]], unseen, costs)
    return float(agreement[0]), float(cost[0])


def plain_scores(clusterer: ExitClusterer, images) -> Recorded:
    cascade = clusterer.cascade_.with_own_rules()
    for rule in cascade.exit_rules:
        rule.temperature.fill_(1)
    source = clusterer._open(images)
    return cascade.record(source.batches(np.arange(len(images)), clusterer.batch_size), len(images))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--encoders", nargs="+", default=["supervised", "simclr"])
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    train, _ = cifar("train")
    test, targets = cifar("test")
    order = np.random.default_rng(0).permutation(len(train))
    held, fitted = train[order[:10_000]], train[order[10_000:]]
    rows, figures = [], []

    def note(**row) -> None:
        figures.append(row)
        metrics = f"{row['acc']:.3f} / {row['acc_full']:.3f}" if "acc" in row else ""
        time = "{median:.3f} ({least:.3f}-{most:.3f})".format(**row["cost_time"]) if "cost_time" in row else ""
        cells = [f"{row[k]:.4f}" for k in ("asked", "agreement")] + [f"{row['cost_macs']:.3f}", time, metrics]
        rows.append((row["encoder"], row["rule"], f"{row['confidence']:.2f}", *cells))
        print("  ".join(rows[-1]), flush=True)

    for name in args.encoders:
        common = {"preprocessing": PREPROCESSING[name], "holdout": 0, "progress": False}
        default = ExitClusterer(encoder(name), **common).fit(fitted)
        e2cm = ExitClusterer(encoder(name), rule="e2cm", descriptor="average", accumulate=False, **common).fit(fitted)
        for asked in ASKED:
            for rule, clusterer, confidence in (
                ("centroid", default, 0.5),
                ("centroid", default, 0.95),
                ("e2cm", e2cm, 0.5),
            ):
                clusterer.calibrate(held, 1 - asked, confidence)
                times = args.repeats if rule == "centroid" else 1
                found = [clusterer.evaluate(test, targets) for _ in range(times)]
                one = found[0]
                note(
                    encoder=name,
                    rule=rule,
                    confidence=confidence,
                    asked=asked,
                    agreement=one.agreement,
                    cost_macs=one.cost_macs,
                    cost_time=spread([f.cost_time for f in found]),
                    **one.metrics,
                )
            agreement, cost = one_threshold(default, held, test, asked)
            note(encoder=name, rule="one threshold", confidence=0.5, asked=asked, agreement=agreement, cost_macs=cost)
    head = ("encoder", "rule", "confidence", "asked", "agreement", "cost MACs", "cost time", "ACC early / whole")
    print("\n" + text_table(head, rows))
    report("frozen", figures)


if __name__ == "__main__":
    main()
