"""What early exit saves on a frozen encoder with the default rule, without a gradient step.

    uv run python benchmarks/frozen.py

Two frozen ResNet-20 (supervised, SimCLR), CIFAR-10 (re-encoded as JPEG), K = 10. Fit on 40,000 training images,
thresholds on the other 10,000, figures on the 10,000 test images. Columns: agreement asked and reached; cost in
multiply-adds, exits' own included; "at asked": the least cost on the threshold path that reaches the agreement
asked on the test images themselves, which compares rules at equal agreement (see benchmarks/rules.py for other rules);
measured time / time of the full encoder, in turns in one run (median, least and most); clustering ACC of early-exit
and whole-encoder labels. Confidence 0.5 asks for no safety margin; 0.95 is the library's default.
"""

import argparse
import warnings

import numpy as np
from common import PREPROCESSING, cifar, clusterer, encoder, report, spread

from ssl_exit.report.tables import text_table

ASKED = (0.99, 0.98, 0.95)


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
        c = clusterer(encoder(name), PREPROCESSING[name], holdout=0).fit(fitted)
        for confidence in (0.5, 0.95):
            for asked in ASKED:
                c.calibrate(held, 1 - asked, confidence)
                if asked == ASKED[0] and confidence == 0.5:
                    costs, agreements = c.trade_off(test)
                found = [c.evaluate(test, targets) for _ in range(args.repeats if confidence == 0.5 else 1)]
                figures.append(
                    {
                        "encoder": name,
                        "confidence": confidence,
                        "asked": asked,
                        "agreement": found[0].agreement,
                        "cost_macs": found[0].cost_macs,
                        "cost_at_asked": float(costs[agreements >= asked].min()),
                        "cost_time": spread([f.cost_time for f in found]),
                        **found[0].metrics,
                    }
                )
                print(row(figures[-1]), flush=True)
    head = ("encoder", "confidence", "asked", "agreement", "cost", "at asked", "time", "ACC early / full")
    print("\n" + text_table(head, [row(figure) for figure in figures]))
    report("frozen", figures)


def row(figure: dict) -> tuple[str, ...]:
    return (
        figure["encoder"],
        f"{figure['confidence']:.2f}",
        f"{figure['asked']:.2f}",
        f"{figure['agreement']:.4f}",
        f"{figure['cost_macs']:.3f}",
        f"{figure['cost_at_asked']:.3f}",
        "{median:.2f} ({least:.2f}-{most:.2f})".format(**figure["cost_time"]),
        f"{figure['acc']:.3f} / {figure['acc_full']:.3f}",
    )


if __name__ == "__main__":
    main()
