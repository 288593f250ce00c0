"""Does n_clusters="auto" find the number of classes, and how long does it take?

    uv run python benchmarks/n_clusters.py

Silhouette, stability and their product for every candidate, on features of 4,000 training images of CIFAR-10
(re-encoded as JPEG) by two frozen ResNet-20, and on the pixels of scikit-learn's 1,797 digits; three seeds draw images
and splits. The classes, ten each, are not used.
"""

import time

import numpy as np
import torch
from common import PREPROCESSING, cifar, encoder, report
from sklearn.datasets import load_digits

from ssl_exit.fitting.n_clusters import IMAGES, choose_n_clusters
from ssl_exit.report.tables import text_table

SEEDS = 3


def features_of(name: str, seed: int) -> torch.Tensor:
    """(N, F)."""
    if name == "digits":
        return torch.from_numpy(load_digits().data).float()
    pixels, _ = cifar("train")
    some = pixels[np.random.default_rng(seed).permutation(len(pixels))[:IMAGES]]
    network = encoder(name).build()
    with torch.inference_mode():
        images = PREPROCESSING[name].normalize(some.float() / 255)
        return torch.cat([network(batch) for batch in images.split(500)])


def main() -> None:
    """Choose, print a table and write benchmarks/results/n_clusters.json."""
    rows, figures = [], []
    for name in ("digits", "supervised", "simclr"):
        for seed in range(SEEDS):
            features = features_of(name, seed)
            start = time.perf_counter()
            counts = choose_n_clusters(features, spherical=True, seed=seed)
            seconds = time.perf_counter() - start
            best = max(counts, key=lambda one: one.merit)
            rows.append((name, str(seed), str(best.n_clusters), f"{best.merit:.3f}", f"{seconds:.1f}"))
            merits = {one.n_clusters: one.merit for one in counts}
            figures.append({"features": name, "seed": seed, "chosen": best.n_clusters, "merits": merits, "s": seconds})
    print(text_table(("features", "seed", "n_clusters", "silhouette x stability", "seconds"), rows))
    report("n_clusters", figures)


if __name__ == "__main__":
    main()
