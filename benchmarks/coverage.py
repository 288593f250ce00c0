"""Do certificates hold, and what do they cost?

    uv run python benchmarks/coverage.py

Real: a frozen SimCLR ResNet-20 on the 50,000 CIFAR-10 training images, K = 10, rule "centroid", descriptors stored
once. In every one of `--draws` redraws the images are divided anew at random: 5,000 to fit (k-means, exits), 6,667 to
calibrate (of which 5,000 certify), and the others, on which the true disagreement is counted. "exit" is left out there:
6 exits and 10 labels would need some 370 images each that leave and all agree.

Synthetic: one exit, an image disagrees with probability 1 - score, so that the true disagreement of a threshold t is
(1 - t)^2 / 2.

Printed for every guarantee at eps = 2 %, delta = 5 %: how often the promise was broken (for "cluster" by any cluster,
for "exit" by what leaves at the exit), with its 95 % interval (Clopper-Pearson); mean disagreement; mean cost; and that
cost / what an oracle would pay, who knows the true disagreement of every setting on the path and takes the last that
keeps eps overall.
"""

import argparse
import time

import numpy as np
import torch
from common import PREPROCESSING, cifar, encoder, report
from scipy.stats import beta
from torch import Tensor

from ssl_exit.cascade.cascade import Cascade
from ssl_exit.encoders.tapped import TappedEncoder
from ssl_exit.exits.across import AcrossExits
from ssl_exit.exits.certificate import GUARANTEES, SettingCounts, certify, close_thin_cells
from ssl_exit.exits.final import FinalClusters
from ssl_exit.exits.registry import build_rules
from ssl_exit.exits.statistics import ClusterStatistics
from ssl_exit.exits.thresholds import NEVER, Recorded, simulate, threshold_path
from ssl_exit.fitting.count import Collected, Statistics
from ssl_exit.fitting.record import Logits, fit_temperatures
from ssl_exit.report.tables import text_table

K, EPS, CONFIDENCE = 10, 0.02, 0.95
FIT, SHAPE, CERTIFY = 5000, 1667, 5000


def stored() -> tuple[TappedEncoder, Tensor, Tensor]:
    """The encoder, descriptors of all exits, (N, D), and final features, (N, F)."""
    module = encoder("simclr").build().eval()
    tapped = TappedEncoder.build(module, "auto", torch.zeros(1, 3, 32, 32), descriptor="average").eval()
    with torch.inference_mode():
        found = [tapped(PREPROCESSING["simclr"](x)) for x in cifar("train")[0].split(500)]
    return tapped, torch.cat([d for d, _ in found]), torch.cat([f for _, f in found])


def divided(tapped: TappedEncoder, described: Tensor, features: Tensor, seed: int) -> tuple[Recorded, ...]:
    """Fitted to some of the images: what the exits say of those that shape, those that certify, and the others."""
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(features)))
    fit, *parts = order.tensor_split(np.cumsum([FIT, SHAPE, CERTIFY]).tolist())
    final = FinalClusters.fit(features[fit], K, spherical=True, seed=seed)
    labels = final(features[fit])
    statistics = ClusterStatistics.empty(K, described[fit].double().mean(0))
    statistics.add(described[fit], labels)
    collected = Collected(final, Statistics([statistics]), described[fit], labels, torch.empty(FIT, 0), FIT)
    cascade = collected.fit(tapped, build_rules("centroid", tapped.seen, K), AcrossExits(), seed)
    shaping, *others = (logits(cascade, described[rows], features[rows]) for rows in parts)
    rules, shaped = fit_temperatures(cascade.rules, cascade.across, shaping)
    recorded = [cascade.across.decide_all(rules, one.of_each(rules)) for one in others]
    pairs = zip(recorded, others, strict=True)
    return shaped, *(Recorded(labels.numpy(), scores.numpy(), one.final.numpy()) for (labels, scores), one in pairs)


@torch.inference_mode()
def logits(cascade: Cascade, described: Tensor, features: Tensor) -> Logits:
    """Logits of all exits, and labels of the full encoder."""
    columns = zip(cascade.rules, cascade.tapped.columns, strict=True)
    values = torch.stack([rule.logits(described[:, part]) for rule, part in columns], dim=1)
    return Logits(values.clone(), cascade.final(features).clone())


def worst(guarantee: str, others: Recorded, labels: np.ndarray) -> float:
    """The largest share of disagreement that the guarantee is about."""
    wrong = labels != others.final
    if guarantee in ("overall", "expectation"):
        return float(wrong.mean())
    share = np.bincount(others.final, weights=wrong) / np.maximum(np.bincount(others.final), 1)
    return float(share.max())


def oracle(path: np.ndarray, others: Recorded, costs: np.ndarray) -> float:
    """Cost of the last setting that keeps eps on the others; disagreement all but grows along the path."""
    low, high = 0, len(path)
    while high - low > 1:
        middle = (low + high) // 2
        fine = (simulate(others, path[middle])[0] != others.final).mean() <= EPS
        low, high = (middle, high) if fine else (low, middle)
    return float(costs[simulate(others, path[low])[1]].mean())


def real(draws: int, guarantees: list[str]) -> dict[str, list[tuple[float, float, float, float]]]:
    """For every guarantee and draw: worst share, overall share, cost, the oracle's cost."""
    tapped, described, features = stored()
    costs = np.cumsum(tapped.staged.macs) / sum(tapped.staged.macs)
    found: dict[str, list] = {name: [] for name in guarantees}
    began = time.perf_counter()
    for seed in range(draws):
        shaping, proof, others = divided(tapped, described, features, seed)
        path = threshold_path(shaping, costs, K)
        best, counts = oracle(path, others, costs), SettingCounts.count(path, proof)
        for name in guarantees:
            setting, _ = certify(path, counts, costs, EPS, CONFIDENCE, name)
            labels, exits = simulate(others, path[setting])
            share = float((labels != others.final).mean())
            found[name].append((worst(name, others, labels), share, float(costs[exits].mean()), best))
        if seed % 50 == 49:
            print(f"{seed + 1} draws, {time.perf_counter() - began:.0f} s", flush=True)
    return found


def synthetic(draws: int, guarantees: list[str]) -> dict[str, list[tuple[float, float, float, float]]]:
    """The same where the true disagreement is known; the two clusters are alike."""
    rng, costs = np.random.default_rng(0), np.array([0.25, 1.0])
    path = np.array([NEVER, *np.linspace(1, 0, 1000)])[:, None, None] * np.ones((1, 1, 2))
    best = 1 - 0.75 * np.sqrt(2 * EPS)
    found: dict[str, list] = {name: [] for name in guarantees}

    def drawn(n: int) -> Recorded:
        scores, final = rng.uniform(size=(n, 1)), rng.integers(0, 2, n)
        wrong = rng.uniform(size=n) > scores[:, 0]
        return Recorded(np.where(wrong, 1 - final, final)[:, None], scores, final)

    for _ in range(draws):
        shaping, proof = drawn(SHAPE), drawn(CERTIFY)
        for name in guarantees:
            tried = close_thin_cells(path, shaping, CERTIFY, EPS, CONFIDENCE) if name == "exit" else path
            counts = SettingCounts.count(tried, proof)
            thresholds = np.minimum(tried[certify(tried, counts, costs, EPS, CONFIDENCE, name)[0]][0], 1.0)
            leaving = float((1 - thresholds).mean())
            risk = float(((1 - thresholds) ** 2 / 2).mean())
            worst_share = {"cluster": ((1 - thresholds) ** 2 / 2).max(), "exit": (1 - thresholds).max() / 2}
            found[name].append((float(worst_share.get(name, risk)), risk, 1 - 0.75 * leaving, best))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--real-draws", type=int, default=1000, help="of the real encoder, which take longer")
    parser.add_argument("--guarantees", nargs="+", default=list(GUARANTEES))
    args = parser.parse_args()
    figures, rows = [], []
    found = {"synthetic": synthetic(args.draws, args.guarantees)}
    found["real"] = real(args.real_draws, [name for name in args.guarantees if name != "exit"])
    for case, of_each in found.items():
        for name, each in of_each.items():
            worst_share, share, cost, best = np.array(each).T
            broken, n = int((worst_share > EPS).sum()), len(each)
            interval = [
                float(beta.ppf(0.025, broken, n - broken + 1)) if broken else 0.0,
                float(beta.ppf(0.975, broken + 1, n - broken)) if broken < n else 1.0,
            ]
            figure = {
                "case": case,
                "guarantee": name,
                "draws": n,
                "broken": broken / n,
                "interval": interval,
                "disagreement": float(share.mean()),
                "cost": float(cost.mean()),
                "cost_over_oracle": float((cost / best).mean()),
            }
            figures.append(figure)
            rows.append(
                (
                    case,
                    name,
                    f"{figure['broken']:.3f} ({interval[0]:.3f}-{interval[1]:.3f})",
                    *(f"{figure[k]:.4f}" for k in ("disagreement", "cost", "cost_over_oracle")),
                )
            )
    print("\n" + text_table(("case", "guarantee", "broken", "disagreement", "cost", "/ oracle"), rows))
    report("coverage", {"settings": {"eps": EPS, "confidence": CONFIDENCE, "n": CERTIFY} | vars(args), "rows": figures})


if __name__ == "__main__":
    main()
