"""What does it cost not to pool the images?

    uv run python benchmarks/federated.py

Fits: ten clients share 10,000 CIFAR-10 training images by a Dirichlet distribution over classes (alpha = 0.3), frozen
SimCLR ResNet-20, K = 10, 5 % disagreement at 95 % confidence; five seeds (of the split, of the clustering, of the
images). Beside a fit of all images in one process, and fits of every client alone. Agreement, cost and ACC on the
10,000 test images (2,000 for clients alone), which nothing was chosen on. Bytes are those of the arrays.

Coverage: exits of the first seed's model on 20,000 other training images. In every one of `--draws` redraws each of ten
clients draws 150 images from its own distribution of classes, which alpha makes more or less unlike the others'; all
that they send is counts. How often is the certified setting's true disagreement, over the clients' distributions
together ("mixture"), or at any of them ("client"), above eps? With its 95 % interval (Clopper-Pearson).
"""

import argparse
import time
import warnings
from functools import reduce
from operator import add

import numpy as np
import torch
from common import PREPROCESSING, cifar, clusterer, encoder, report
from scipy.stats import beta

from ssl_exit import ExitClusterer
from ssl_exit.data.images import open_images
from ssl_exit.exits.certificate import SettingCounts, certify
from ssl_exit.exits.mixture import client_passes, mixture_passes
from ssl_exit.exits.thresholds import simulate
from ssl_exit.federated import Client, Federation, dirichlet_split, fit_federated, local_clients
from ssl_exit.fitting.record import record
from ssl_exit.measure.metrics import clustering_accuracy
from ssl_exit.report.tables import text_table

CLIENTS, ALPHA, EPS, IMAGES = 10, 0.3, 0.05, 10_000
HOW = {
    "federated, counts": Federation(),
    "federated, rows": Federation(thresholds="rows"),
    "federated, trim 0.1": Federation(trim=0.1),
    "federated, every client": Federation(guarantee="client"),
}


def made(seed: int) -> ExitClusterer:
    return clusterer(encoder("simclr"), PREPROCESSING["simclr"], n_clusters=10, max_disagreement=EPS, seed=seed)


def judged(c: ExitClusterer, images: torch.Tensor, targets: np.ndarray) -> dict[str, float]:
    result, full = c.run(images), c.predict_full(images)
    return {
        "agreement": float((result.labels == full).mean()),
        "cost": float(result.cost.mean()),
        "acc": clustering_accuracy(result.labels, targets),
    }


def fits(seed: int) -> tuple[dict[str, dict[str, float]], ExitClusterer]:
    """Figures of every way to fit, and the clusterer that counts alone fitted."""
    (pixels, targets), test = cifar("train"), cifar("test")
    own = np.random.default_rng(seed).permutation(len(pixels))[:IMAGES]
    parts = [own[part] for part in dirichlet_split(targets[own], CLIENTS, ALPHA, seed)]
    clients = {i: Client(made(seed), pixels[part], rows=True) for i, part in enumerate(parts)}
    rows: dict[str, dict[str, float]] = {}
    first = None
    for name, how in HOW.items():
        start, c = time.perf_counter(), made(seed)
        told = fit_federated(c, local_clients(clients), how)
        seconds = time.perf_counter() - start
        worst = told.worst
        up = {q["question"]: q["bytes_up"] / CLIENTS for q in told.questions}
        rows[name] = judged(c, *test) | {
            "up": told.bytes_up / CLIENTS, "down": told.bytes_down / CLIENTS, "questions": len(told.questions),
            "statistics": up["statistics"], "lloyd": up.get("lloyd", 0.0), "counts": up["counts"],
            "worst": worst.disagreements / worst.n if worst else 0.0, "seconds": seconds,
        }  # fmt: skip
        first = first or c
    pooled = made(seed).fit(pixels[own])
    rows["pooled"] = judged(pooled, *test)
    alone = [judged(made(seed).fit(pixels[part]), test[0][:2000], test[1][:2000]) for part in parts if len(part) >= 50]
    rows["each alone"] = {name: float(np.mean([one[name] for one in alone])) for name in alone[0]}
    assert first is not None
    return rows, first


def coverage(c: ExitClusterer, draws: int) -> list[dict[str, float | str]]:
    """How often certificates over clients are wrong."""
    pixels, targets = cifar("train")
    rest = np.random.default_rng(0).permutation(len(pixels))[IMAGES : IMAGES + 20_000]
    cascade, path = c.model_.cascade, c.model_.path
    source = open_images(pixels[rest], PREPROCESSING["simclr"])
    recorded, _ = record(cascade, source.batches(np.arange(len(source)), 256))
    results = [simulate(recorded, thresholds) for thresholds in path]
    wrong = np.stack([labels != recorded.final for labels, _ in results], axis=1)  # (N, S)
    at = np.stack([exits for _, exits in results], axis=1)
    classes, k, e = targets[rest], path.shape[2], path.shape[1]
    by_class = [np.flatnonzero(classes == value) for value in range(10)]
    rates = np.stack([wrong[rows].mean(0) for rows in by_class])  # (10, S)
    rng, n, delta = np.random.default_rng(1), 150, 0.05
    result: list[dict[str, float | str]] = []
    for alpha in (0.1, 0.3, 1.0, 100.0):
        broken, costs = {"mixture": 0, "client": 0}, {"mixture": 0.0, "client": 0.0}
        for _ in range(draws):
            shares = rng.dirichlet(np.full(10, alpha), CLIENTS)
            truth = shares @ rates  # (M, S)
            each = []
            for own in shares:
                counts = rng.multinomial(n, own)
                rows = np.concatenate([rng.choice(by_class[v], size=m) for v, m in enumerate(counts)])
                left = np.zeros((len(path), e, k), dtype=np.int64)
                left[:, :, 0] = (at[rows][:, :, None] == np.arange(e)).sum(0)
                w = wrong[rows].sum(0)[:, None]
                wide = np.hstack([w, np.zeros((len(path), k - 1), dtype=np.int64)])
                of_cluster = np.array([n, *[0] * (k - 1)])
                each.append(SettingCounts(left, left * 0, of_cluster, wide, np.maximum.accumulate(w[:, 0])))
            total = reduce(add, each)
            for guarantee, passes in (
                ("mixture", mixture_passes(each, EPS, delta)), ("client", client_passes(each, EPS, delta)),
            ):  # fmt: skip
                setting, certificate = certify(path, total, cascade.costs, EPS, 1 - delta, guarantee, passes, CLIENTS)
                true = truth[:, setting].mean() if guarantee == "mixture" else truth[:, setting].max()
                broken[guarantee] += bool(true > EPS)
                costs[guarantee] += certificate.cost
        for guarantee, times in broken.items():
            low = beta.ppf(0.025, times, draws - times + 1) if times else 0.0
            result.append({
                "alpha": alpha, "guarantee": guarantee, "broken": times / draws, "low": float(low),
                "high": float(beta.ppf(0.975, times + 1, draws - times)), "cost": costs[guarantee] / draws,
            })  # fmt: skip
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--draws", type=int, default=1000)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    seeds, first = [], None
    for seed in range(args.seeds):
        rows, c = fits(seed)
        first = first or c
        seeds.append(rows)
        print(seed, {name: {k: round(v, 3) for k, v in row.items()} for name, row in rows.items()}, flush=True)
    assert first is not None
    covered = coverage(first, args.draws)
    table = []
    for name in seeds[0]:
        values = {key: np.array([rows[name][key] for rows in seeds]) for key in seeds[0][name]}
        cells = [f"{values[key].mean():.3f} ± {values[key].std():.3f}" for key in ("agreement", "cost", "acc")]
        up, down = (f"{values[key].mean() / 1e6:.2f}" if key in values else "" for key in ("up", "down"))
        worst = f"{values['worst'].mean():.3f}" if "worst" in values else ""
        table.append([name, *cells, up, down, worst])
    print(text_table(["fit", "agreement", "cost", "ACC", "MB up", "MB down", "worst client"], table))
    print(text_table(
        ["alpha", "guarantee", "broken", "95 % interval", "mean cost"],
        [[f"{r['alpha']:g}", str(r["guarantee"]), f"{r['broken']:.3f}", f"{r['low']:.3f} to {r['high']:.3f}",
          f"{r['cost']:.3f}"] for r in covered],
    ))  # fmt: skip
    report("federated", {"seeds": seeds, "coverage": covered, "draws": args.draws})


if __name__ == "__main__":
    main()
