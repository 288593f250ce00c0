"""What thresholds and exits should save by default: multiply-adds, or time as measured in fit()?

    uv run python benchmarks/saved_cost.py

Frozen encoders on CIFAR-10 (re-encoded as JPEG) and a ResNet-18 with random weights on the same images at 64 pixels,
K = 10, exits inside the encoder (the default rule), 2 % disagreement. For each of three seeds 18,000 training images to
fit and calibrate; on 4,000 other training images, in the same run: cost in multiply-adds, cost in measured time (median
of three looks), and agreement, with calibration cost="macs" and cost="time".
"""

import argparse
import warnings

import numpy as np
import torch
import torch.nn.functional as F
from common import PREPROCESSING, cifar, clusterer, encoder, report, spread

from ssl_exit import EncoderSpec
from ssl_exit.report.tables import text_table
from ssl_exit.training.run import seeded

FITTED, JUDGED, SEEDS, LOOKS = 18_000, 4_000, 3, 3


def measure(name: str, seed: int, images: torch.Tensor, parts: tuple[np.ndarray, np.ndarray]) -> list[dict[str, float]]:
    """One row for each cost that is saved."""
    with seeded(0):
        network = EncoderSpec("resnet18").build() if name == "resnet18" else encoder(name)
    rows = []
    for saved in ("macs", "time"):
        c = clusterer(network, cost=saved, seed=seed, device="cpu").fit(images[parts[0]])
        looks = [c.evaluate(images[parts[1]]) for _ in range(LOOKS)]
        time = spread([look.cost_time for look in looks])["median"]
        row = {"encoder": name, "saved": saved, "seed": seed, "agreement": looks[0].agreement}
        rows.append(row | {"macs": looks[0].cost_macs, "time": time, "exits": len(c.exit_points_)})
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    """Measure, print a table and write benchmarks/results/saved_cost.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    pixels, _ = cifar("train")
    rows = []
    for name in ("simclr", "supervised", "resnet18"):
        images = PREPROCESSING["simclr" if name == "simclr" else "supervised"].normalize(pixels[:40_000].float() / 255)
        for seed in range(args.seeds):
            order = np.random.default_rng(seed).permutation(len(images))
            fitted, judged = order[: FITTED // 6 if name == "resnet18" else FITTED], order[-JUDGED:]
            if name == "resnet18":
                both = np.concatenate([fitted, judged[:1000]])
                large = F.interpolate(images[both], size=64, mode="bilinear")
                rows += measure(name, seed, large, (np.arange(len(fitted)), np.arange(len(fitted), len(both))))
            else:
                rows += measure(name, seed, images, (fitted, judged))
    table = []
    for name in ("simclr", "supervised", "resnet18"):
        for saved in ("macs", "time"):
            own = [row for row in rows if (row["encoder"], row["saved"]) == (name, saved)]
            figures = [spread([row[key] for row in own]) for key in ("macs", "time", "agreement")]
            table.append((name, saved, *(f"{s['median']:.3f} ({s['least']:.3f} to {s['most']:.3f})" for s in figures)))
    print(text_table(("encoder", "saved", "cost, multiply-adds", "cost, time", "agreement"), table))
    report("saved_cost", {"images": {"fit": FITTED, "judged": JUDGED}, "rows": rows})


if __name__ == "__main__":
    main()
