"""What fit() costs beside a bare pass of the encoder over the same images, and what k-means takes of it.

    uv run python benchmarks/fit_speed.py

A frozen SimCLR ResNet-20 and the 50,000 CIFAR-10 training images, K = 10 and 100. In turns: the encoder as its author
wrote it over all images (batches of 256, float32, nothing kept but features), the same in the engine (batch norms
folded, channels last), and `ExitClusterer.fit`, hold-out, k-means, rules, exit placement, thresholds and certificate
included.

k-means: that of fit() on its sample (10,000 images, or 256 a cluster), here by Euclidean distance, against
scikit-learn's KMeans on all 50,000 with as many starts, and with its default of one. Inertia is that of all 50,000
features, of unit length, to the nearest mean. Each repeat times k-means five times, since it is short.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import faiss
import numpy as np
import torch
import torch.nn.functional as F
from common import PREPROCESSING, cifar, clusterer, encoder, report, spread
from sklearn.cluster import KMeans

from ssl_exit.encoders.tapped import TappedEncoder
from ssl_exit.exits.kmeans import kmeans
from ssl_exit.fitting.sample import Clustering
from ssl_exit.report.tables import text_table

HOW = PREPROCESSING["simclr"]


def seconds_of(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    found = work()
    return time.perf_counter() - start, found


@torch.inference_mode()
def features(run: Callable[[torch.Tensor], torch.Tensor], pixels: torch.Tensor) -> torch.Tensor:
    return torch.cat([run(HOW(part)) for part in pixels.split(256)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--images", type=int, default=50_000)
    args = parser.parse_args()
    pixels = cifar("train")[0][np.random.default_rng(0).permutation(50_000)[: args.images]]
    net = encoder("simclr").build().eval()
    engine = TappedEncoder.build(net, "auto", HOW(pixels[:1])).for_inference("float32", (3, 32, 32))
    rows: dict[str, list[float]] = {}
    for repeat in range(args.repeats):
        bare, found = seconds_of(lambda: features(net, pixels))
        in_engine, _ = seconds_of(lambda: features(lambda x: engine.final_features(engine.enter(x)), pixels))
        rows.setdefault("bare pass, seconds", []).append(bare)
        rows.setdefault("bare pass in the engine / bare pass", []).append(in_engine / bare)
        for k in (10, 100):
            c = clusterer(encoder("simclr"), HOW, n_clusters=k)
            fit, _ = seconds_of(lambda c=c: c.fit(pixels))
            rows.setdefault(f"fit / bare pass, K = {k}", []).append(fit / bare)
            points = F.normalize(found, dim=1).numpy()
            sample = points[: Clustering(k).wanted]
            for run in range(5 * repeat, 5 * repeat + 5):
                ours, centroids = seconds_of(lambda s=sample, k=k, r=run: kmeans(s, k, seed=r))
                inertia = float(faiss.knn(points, centroids, 1)[0].sum())
                rows.setdefault(f"k-means, seconds, K = {k}", []).append(ours)
                for starts in (1, 5):
                    theirs = KMeans(k, n_init=starts, random_state=run)
                    taken, _ = seconds_of(lambda theirs=theirs, points=points: theirs.fit(points))
                    rows.setdefault(f"scikit-learn, {starts} starts / k-means, K = {k}", []).append(taken / ours)
                    name = f"inertia / scikit-learn's, {starts} starts, K = {k}"
                    rows.setdefault(name, []).append(inertia / theirs.inertia_)
    figures = {name: spread(values) for name, values in rows.items()}
    report("fit_speed", {"settings": vars(args), "rows": figures})
    table = [(name, *(f"{s[key]:.3f}" for key in ("median", "least", "most"))) for name, s in figures.items()]
    print(text_table(("", "median", "least", "most"), table))


if __name__ == "__main__":
    main()
