"""How soon does the audit find a drift, and how often is it wrong?

    uv run python benchmarks/drift.py

A frozen SimCLR ResNet-20, K = 10, fitted to the CIFAR-10 training images (a fifth held out), certified at eps = 2 %
with confidence 95 %. Streams are drawn with replacement from the 10,000 test images: as they are, or changed from a
certain image on: blurred (Gaussian, sigma 1), with noise (Gaussian, standard deviation 15 of 255), darkened (to 60 %),
or another data set (scikit-learn's digits at 32 pixels). One in ten images that leave early is audited; false alarms
are allowed in 1 % of streams, however long. Printed: the true disagreement; of `--streams` streams of 100,000 clean
images, how many raise an alarm; of streams that change after 0 and after 10,000 clean images, images from the change to
the alarm (median, most; alarms before the change count as false).
"""

import argparse

import numpy as np
import torch
import torchvision.transforms.v2.functional as T
from common import PREPROCESSING, cifar, clusterer, encoder, report
from sklearn.datasets import load_digits
from torch import Tensor

from ssl_exit.exits.audit import DriftAudit
from ssl_exit.report.tables import text_table

EPS, SHARE, FALSE_ALARM = 0.02, 0.1, 0.01
CLEAN, CALM, CHANGED = 100_000, 10_000, 50_000


def shifted(images: Tensor) -> dict[str, Tensor]:
    """Kinds of images, (N, 3, 32, 32) uint8 each."""
    noise = 15 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    digits = torch.tensor(load_digits().images, dtype=torch.float32)[:, None] * (255 / 16)
    large = torch.nn.functional.interpolate(digits, size=32, mode="bilinear").expand(-1, 3, -1, -1)
    return {
        "clean": images,
        "blur": T.gaussian_blur(images, [7, 7], [1.0, 1.0]),
        "noise": (images + noise).clamp(0, 255).byte(),
        "dark": (images * 0.6).byte(),
        "digits": large.byte(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=200)
    args = parser.parse_args()
    c = clusterer(encoder("simclr"), PREPROCESSING["simclr"], max_disagreement=EPS, batch_size=500)
    c.fit(cifar("train")[0])
    print(c.certificate_)
    seen = {}
    for name, images in shifted(cifar("test")[0]).items():
        found = c.run(images)
        early = found.exits < len(c.exit_points_)
        seen[name] = early, early & (found.labels != c.predict_full(images))
    rng = np.random.default_rng(0)

    def feed(audit: DriftAudit, name: str, n: int) -> None:
        early, wrong = (part[rows] for rows in [rng.integers(0, len(seen[name][0]), n)] for part in seen[name])
        audit.update(early & (rng.random(n) < SHARE), wrong)

    figures, rows = [], []
    for name, (early, wrong) in seen.items():
        figure = {"images": name, "early": float(early.mean()), "disagreement": float(wrong.mean())}
        for calm in (CLEAN,) if name == "clean" else (0, CALM):
            delays, false = [], 0
            for _ in range(args.streams):
                audit = DriftAudit(EPS, SHARE, FALSE_ALARM)
                feed(audit, "clean", calm)
                if audit.alarm is not None:
                    false += 1
                elif name != "clean":
                    feed(audit, name, CHANGED)
                    delays.append(np.inf if audit.alarm is None else audit.alarm - calm)
            figure[f"after {calm}"] = {
                "false": false,
                "found": int(np.isfinite(delays).sum()),
                "median": float(np.median(delays)) if delays and np.isfinite(np.median(delays)) else None,
                "most": float(max(delays)) if delays and np.isfinite(max(delays)) else None,
            }
        figures.append(figure)
        rows.append(
            (name, f"{early.mean():.3f}", f"{wrong.mean():.4f}", *(str(v) for k, v in figure.items() if " " in k))
        )
        print(rows[-1], flush=True)
    print("\n" + text_table(("images", "leave early", "disagreement", "alarms", "alarms after a calm"), [
        (*row, "") if len(row) == 4 else row for row in rows
    ]))  # fmt: skip
    settings = {"eps": EPS, "share": SHARE, "false_alarm": FALSE_ALARM, "streams": args.streams}
    report("drift", {"settings": settings, "certificate": c.certificate_.to_dict(), "rows": figures})


if __name__ == "__main__":
    main()
