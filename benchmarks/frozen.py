"""What early exit saves on a frozen encoder, without a gradient step.

    uv run python benchmarks/frozen.py

Two frozen ResNet-20 (supervised, SimCLR), CIFAR-10 (re-encoded as JPEG), K = 10. Fit on 40,000 training images,
thresholds on the other 10,000, figures on the 10,000 test images. Columns: agreement asked and reached; cost in
multiply-adds, exits' own included; "at asked": the least cost on the threshold path that reaches the agreement
asked on the test images themselves, which compares rules at equal agreement; measured time / time of the whole
encoder, in turns in one run (median, least and most); clustering ACC of early-exit and whole-encoder labels.
Confidence 0.5 asks for no safety margin; 0.95 is the library's default.

Rows "one threshold" are the same centroids (means of the final clusters, shared covariance, accumulated pyramid
descriptors) with the plain softmax score and a single threshold for all exits and clusters. Rows "e2cm" are
unsupervised E2CM on global averages.
"""

import argparse
import warnings

import numpy as np
from common import PREPROCESSING, cifar, encoder, report, spread

from ssl_exit import ExitClusterer
from ssl_exit.exits.thresholds import Recorded, trade_off
from ssl_exit.report.tables import text_table

ASKED = (0.99, 0.98, 0.95)


def single_thresholds(scores: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Settings with one threshold for all exits and clusters, from never to always."""
    grid = np.unique(np.quantile(scores, np.linspace(0, 1, 400)))[::-1]
    return grid[:, None, None] * np.ones(shape)


def cheapest(costs_and_agreements: tuple[np.ndarray, np.ndarray], asked: float) -> float:
    """Least cost of a setting that reaches the agreement on the same images."""
    costs, agreements = costs_and_agreements
    return float(costs[agreements >= asked].min())


def plain_scores(clusterer: ExitClusterer, images) -> Recorded:
    cascade = clusterer.cascade_.with_own_rules()
    for rule in cascade.exit_rules:
        rule.temperature.fill_(1)
    source = clusterer._open(images)
    return cascade.record(source.batches(np.arange(len(images)), clusterer.batch_size), len(images))[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--encoders", nargs="+", default=["supervised", "simclr"])
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    train, _ = cifar("train")
    test, targets = cifar("test")
    order = np.random.default_rng(0).permutation(len(train))
    held, fitted = train[order[:10_000]], train[order[10_000:]]
    figures = []
    for name in args.encoders:
        common = {"preprocessing": PREPROCESSING[name], "holdout": 0, "progress": False}
        default = ExitClusterer(encoder(name), **common).fit(fitted)
        e2cm = ExitClusterer(encoder(name), rule="e2cm", descriptor="average", accumulate=False, **common).fit(fitted)
        for confidence in (0.5, 0.95):
            for asked in ASKED:
                default.calibrate(held, 1 - asked, confidence)
                if asked == ASKED[0] and confidence == 0.5:
                    curve = default.trade_off(test)
                found = [default.evaluate(test, targets) for _ in range(args.repeats if confidence == 0.5 else 1)]
                figures.append(
                    {
                        "encoder": name,
                        "rule": "centroid",
                        "confidence": confidence,
                        "asked": asked,
                        "agreement": found[0].agreement,
                        "cost_macs": found[0].cost_macs,
                        "cost_at_asked": cheapest(curve, asked),
                        "cost_time": spread([f.cost_time for f in found]),
                        **found[0].metrics,
                    }
                )
                print(row(figures[-1]), flush=True)
        plain = plain_scores(default, test)
        path = single_thresholds(plain.scores, default.cascade_.thresholds.shape)
        curves = {"one threshold": trade_off(path, plain, default.cascade_.costs)}
        curves["e2cm"] = e2cm.calibrate(held).trade_off(test)
        for rule, curve in curves.items():
            for asked in ASKED:
                figures.append({"encoder": name, "rule": rule, "asked": asked, "cost_at_asked": cheapest(curve, asked)})
                print(row(figures[-1]), flush=True)
    head = ("encoder", "rule", "confidence", "asked", "agreement", "cost", "at asked", "time", "ACC early / whole")
    print("\n" + text_table(head, [row(figure) for figure in figures]))
    report("frozen", figures)


def row(figure: dict) -> tuple[str, ...]:
    rest = ("", "", "", f"{figure['cost_at_asked']:.3f}", "", "")
    if "agreement" in figure:
        rest = (
            f"{figure['confidence']:.2f}",
            f"{figure['agreement']:.4f}",
            f"{figure['cost_macs']:.3f}",
            f"{figure['cost_at_asked']:.3f}",
            "{median:.2f} ({least:.2f}-{most:.2f})".format(**figure["cost_time"]),
            f"{figure['acc']:.3f} / {figure['acc_full']:.3f}",
        )
    return (figure["encoder"], figure["rule"], rest[0], f"{figure['asked']:.2f}", *rest[1:])


if __name__ == "__main__":
    main()
