"""Every exit rule on the same encoder, images and exits: what agreement, and what accuracy, each costs.

    uv run python benchmarks/rules.py

Frozen ResNet-20 on CIFAR-10 (re-encoded as JPEG), K = 10, all eight candidate exits, in three settings: "supervised
weights" (final clusters of its features; no labels), "simclr" (the same), and "classes" (the supervised mode: means
and heads learn class labels, and the full encoder's answer is its classifier's). For each of five seeds the
training images are split anew: 40,000 to fit, 10,000 for temperatures and thresholds; k-means and heads start from
the seed. Figures are on the 10,000 test images: mean and standard deviation over the seeds of

    cost at 99, 98, 95, 90 % agreement   least cost of a setting on the rule's threshold path that reaches it
    accuracy at that cost                ACC of the clusters, or plain accuracy for "classes"
    fit seconds                          without the pass that computes descriptors, which all rules share

Costs are multiply-adds relative to the full encoder, the exits' own work included. "unpooled" rows take distances on
the whole map, K C H W multiply-adds an exit. Trained heads get the seconds that the centroid rule took in the same run
(x1), and ten times that (x10). Thresholds: per exit for E2CM, as in the paper; otherwise per exit and cluster, unless
the row says "CBT" or "one an exit". A setting run alone (--settings) keeps the others' figures in the file.

For what limits a rule, at 98 % agreement: the cost if exits worked for nothing; the cost of an oracle that leaves at
the first exit whose label agrees; each exit's agreement; and, by fifths of the margin of the full encoder's answer
(largest soft assignment less the second), how many images leave early, how many disagree, and how often the whole
encoder's own label changes when an image is mirrored (held-out images).
"""

import argparse
import json
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial

import matplotlib
import numpy as np
import torch
from common import PREPROCESSING, RESULTS, SHARED, cifar, encoder, report
from safetensors.torch import load_file
from torch import Tensor

from ssl_exit.cascade.cascade import exit_costs
from ssl_exit.encoders.tapped import TappedEncoder
from ssl_exit.exits.across import AcrossExits
from ssl_exit.exits.cbt import cbt_path
from ssl_exit.exits.e2cm import E2CMReleasedRule, E2CMRule
from ssl_exit.exits.final import Final, FinalClasses, FinalClusters
from ssl_exit.exits.registry import build_rules
from ssl_exit.exits.rules import ExitRule
from ssl_exit.exits.statistics import ClusterStatistics
from ssl_exit.exits.thresholds import Recorded, simulate, threshold_path
from ssl_exit.fitting.count import Collected, Statistics
from ssl_exit.measure.metrics import clustering_accuracy
from ssl_exit.report.tables import text_table

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SETTINGS = {"supervised weights": "supervised", "classes": "supervised", "simclr": "simclr"}
ASKED = (0.99, 0.98, 0.95, 0.90)
K = 10
HELD = 10_000
BATCH = 500
GRID = np.linspace(0.2, 1.0, 81)  # costs at which curves are averaged over seeds


@dataclass
class Images:
    """One encoder's view of all images: pooled descriptors, final features and distances on whole maps."""

    tapped: TappedEncoder
    average: TappedEncoder
    described: dict[str, Tensor]
    features: dict[str, Tensor]
    targets: dict[str, np.ndarray]
    pixels: dict[str, Tensor]
    name: str

    def batches(self, part: str):
        """Slices and preprocessed images, (BATCH, 3, 32, 32)."""
        how = PREPROCESSING[self.name]
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (how.mean, how.std))
        for rows in torch.arange(len(self.pixels[part])).split(BATCH):
            yield rows, (self.pixels[part][rows].float() / 255 - mean) / std


@dataclass
class Row:
    """How to get one row of the table."""

    label: str
    rule: str
    options: dict = field(default_factory=dict)
    pooled: str = "pyramid"  # or "average": global averages, each exit its own
    thresholds: str = "search"
    across: AcrossExits = field(default_factory=AcrossExits)
    budget: float | None = None  # times the seconds of the centroid rule
    mirror: bool = False  # fit on mirrored images too
    settings: tuple[str, ...] = tuple(SETTINGS)


ROWS = [
    Row("centroid (default)", "centroid"),
    Row("centroid, CBT thresholds", "centroid", thresholds="cbt"),
    Row("centroid, one threshold an exit", "centroid", thresholds="exit"),
    Row("centroid, patience 2", "centroid", across=AcrossExits(patience=2)),
    Row("centroid, ensemble", "centroid", across=AcrossExits(ensemble=True)),
    Row("centroid, mirrored too", "centroid", mirror=True),
    Row("centroid, own averages", "centroid", pooled="average"),
    Row("mahalanobis", "mahalanobis"),
    Row("pseudo-class means (Euclidean)", "euclidean", pooled="average"),
    Row("k-means a layer, matched", "kmeans", pooled="average"),
    Row("1,000 prototypes", "prototypes", pooled="average"),
    Row("E2CM", "e2cm", pooled="average", thresholds="exit"),
    Row("E2CM as released, pooled", "e2cm_released", pooled="average", thresholds="exit"),
    Row("SDN x1", "sdn", budget=1),
    Row("SDN from centroids x1", "sdn", {"start": "centroid"}, budget=1),
    Row("SDN x10", "sdn", budget=10),
    Row("BranchyNet x1", "branchynet", budget=1),
    Row("BranchyNet x10", "branchynet", budget=10),
    Row("EENet x1", "eenet", budget=1),
    Row("EENet x10", "eenet", budget=10),
    Row("MLP x1", "mlp", budget=1),
    Row("MLP from centroids x1", "mlp", {"start": "centroid"}, budget=1),
    Row("MLP x10", "mlp", budget=10),
    Row("MLP, 20 passes, mirrored too", "mlp", {"epochs": 20}, mirror=True, settings=("supervised weights",)),
    Row("MLP x10, ensemble", "mlp", budget=10, across=AcrossExits(ensemble=True)),
    Row("E2CM + SDN x1", "e2cm+sdn", budget=1),
    Row("centroid + SDN x1", "centroid+sdn", budget=1),
]


def see(setting: str) -> Images:
    """One encoder's view of all images; for "classes", logits take the place of final features."""
    images = seen_by(SETTINGS[setting])
    if setting != "classes":
        return images
    weights = load_file(SHARED / "weights" / "resnet20_cifar10_supervised.safetensors")
    logits = {
        part: features @ weights["linear.weight"].T + weights["linear.bias"]
        for part, features in images.features.items()
    }
    return replace(images, features=logits)


@lru_cache(maxsize=1)
def seen_by(name: str) -> Images:
    """Run an encoder over all images once."""
    encoding = encoder(name).build()
    example = torch.zeros(1, 3, 32, 32)
    pixels, targets = {}, {}
    for part in ("train", "test"):
        pixels[part], targets[part] = cifar(part)
    pixels["mirrored"] = pixels["train"].flip(3)
    tapped = TappedEncoder.build(encoding, "auto", example, descriptor="pyramid").eval()
    average = TappedEncoder.build(encoding, "auto", example, descriptor="average", accumulate=False).eval()
    images = Images(tapped, average, {}, {}, targets, pixels, name)
    for part in pixels:
        described, features = [], []
        with torch.inference_mode():
            for rows, x in images.batches(part):
                one, two = tapped(x)
                described.append(one)
                features.append(two)
                if rows[0] == 0 and part == "train":
                    check_averages(average(x)[0], one, images)
        images.described[part], images.features[part] = torch.cat(described).clone(), torch.cat(features).clone()
    return images


def check_averages(expected: Tensor, pyramids: Tensor, images: Images) -> None:
    """That averages are read off the pyramids as the library pools them."""
    torch.testing.assert_close(averages(images, pyramids), expected, rtol=1e-4, atol=1e-5)


def averages(images: Images, pyramids: Tensor) -> Tensor:
    """Global averages at every exit: the mean of a channel's quarters, which come first in its pyramid."""
    ends = np.cumsum([0, *(d.dim for d in images.tapped.descriptors)])
    dims = [d.dim for d in images.average.descriptors]
    quarters = [pyramids[:, a : a + 4 * dim] for a, dim in zip(ends, dims, strict=False)]
    return torch.cat([q.reshape(len(q), -1, 4).mean(2) for q in quarters], dim=1)


def pooled_as(images: Images, kind: str, part: str) -> Tensor:
    """Descriptors of one kind, (N, D)."""
    described = images.described[part]
    return described if kind == "pyramid" else averages(images, described)


@dataclass
class Split:
    """One seed: who is fitted on, who sets thresholds, and what the answers are."""

    seed: int
    fit: Tensor
    held: Tensor
    final: Final
    whole: dict[str, Tensor]  # the full encoder's labels
    learnt: dict[str, Tensor]  # what exits learn: the same, or classes


def split(images: Images, setting: str, seed: int) -> Split:
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(images.pixels["train"])))
    held, fit = order[:HELD], order[HELD:]
    if setting == "classes":
        final: Final = FinalClasses(K)
    else:
        final = FinalClusters.fit(images.features["train"][fit[:10_000]], K, spherical=True, seed=seed)
    whole = {part: final(features) for part, features in images.features.items()}
    learnt = dict(whole)
    if setting == "classes":
        classes = torch.from_numpy(images.targets["train"])
        learnt = {"train": classes, "mirrored": classes}
    return Split(seed, fit, held, final, whole, learnt)


def collected(images: Images, parts: Split, kind: str, mirror: bool) -> Collected:
    """What a pass of `fit` would have collected, scatter included."""
    tapped = images.tapped if kind == "pyramid" else images.average
    names = ["train", "mirrored"] if mirror else ["train"]
    described = torch.cat([pooled_as(images, kind, name)[parts.fit] for name in names])
    labels = torch.cat([parts.learnt[name][parts.fit] for name in names])
    soft = torch.cat([parts.final.soft(images.features[name][parts.fit]) for name in names])
    columns = [slice(None)] if tapped.accumulate else tapped.columns
    statistics = [ClusterStatistics.empty(K, described[:10_000, c].double().mean(0)) for c in columns]
    for rows in torch.arange(len(labels)).split(4096):
        for c, into in zip(columns, statistics, strict=True):
            into.add(described[rows][:, c], labels[rows])
    return Collected(parts.final, Statistics(statistics), described, labels, soft, 10_000)


def answers(images: Images, kind: str, rules: list[ExitRule], part: str, rows: Tensor) -> list[Tensor]:
    """Logits of every exit, (N, width) each."""
    tapped = images.tapped if kind == "pyramid" else images.average
    described = pooled_as(images, kind, part)[rows]
    with torch.inference_mode():
        return [rule.logits(described[:, c]).clone() for rule, c in zip(rules, tapped.columns, strict=True)]


def record(rules: list[ExitRule], logits: list[Tensor], across: AcrossExits, final: Tensor) -> Recorded:
    labels, scores = across.decide_all(tuple(rules), logits)
    return Recorded(labels.numpy(), scores.numpy(), final.numpy())


def measure(
    images: Images,
    parts: Split,
    setting: str,
    rules: list[ExitRule],
    on_held: list[Tensor],
    on_test: list[Tensor],
    costs: np.ndarray,
    thresholds: str,
    across: AcrossExits,
) -> dict:
    """Temperatures and a threshold path from held-out images; what they give on the test images."""
    final = parts.whole["train"][parts.held]
    for rule, z in zip(rules, on_held, strict=True):
        rule.fit_temperature(z, final)
    seen = record(rules, on_held, across, final)
    if thresholds == "cbt":
        p = [rule.log_probabilities(z).exp() for rule, z in zip(rules, on_held, strict=True)]
        path = cbt_path(seen, costs, np.stack([[q[final == k].mean(0).numpy() for k in range(K)] for q in p]))
    else:
        path = threshold_path(seen, costs, K, per_cluster=thresholds == "search", steps=24, between=10, surest=0)
    test = record(rules, on_test, across, parts.whole["test"])
    targets = images.targets["test"]
    score: Callable = (
        (lambda labels: float((labels == targets).mean()))
        if setting == "classes"
        else partial(clustering_accuracy, targets=targets)
    )
    found = [(labels, costs[exits].mean()) for labels, exits in (simulate(test, t) for t in path)]
    cost = np.array([c for _, c in found])
    agreement = np.array([(labels == test.final).mean() for labels, _ in found])
    accuracy = {}
    at = {}
    for asked in ASKED:
        i = int(np.where(agreement >= asked, cost, np.inf).argmin())
        at[f"{asked:.2f}"] = {"cost": float(cost[i]), "accuracy": score(found[i][0])}
    for c in GRID:
        i = int(np.where(cost <= c, agreement, -1).argmax())
        accuracy[i] = accuracy[i] if i in accuracy else score(found[i][0])
    best = [int(np.where(cost <= c, agreement, -1).argmax()) for c in GRID]
    reached = cost.min() <= GRID
    at_98 = int(np.where(agreement >= 0.98, cost, np.inf).argmin())
    labels, exits = simulate(test, path[at_98])
    work = np.array(images.tapped.staged.macs) / (sum(images.tapped.staged.macs) + parts.final.macs)
    agrees = np.column_stack([test.labels == test.final[:, None], np.ones(len(test), dtype=bool)])
    fifth = fifths(parts.final, images.features["test"])
    return {
        "at": at,
        "cost_if_exits_were_free": float(np.cumsum(work)[exits].mean()),
        "cost_of_oracle": float(np.cumsum(work)[agrees.argmax(1)].mean()),
        "early_by_fifth": [float((exits < len(rules))[fifth == q].mean()) for q in range(5)],
        "disagreement_by_fifth": [float((labels != test.final)[fifth == q].mean()) for q in range(5)],
        "agreement": [float(agreement[i]) if ok else None for i, ok in zip(best, reached, strict=True)],
        "accuracy": [accuracy[i] if ok else None for i, ok in zip(best, reached, strict=True)],
        "accuracy_whole": score(test.final),
        "agreement_of_exits": (test.labels == test.final[:, None]).mean(0).tolist(),
        "costs_of_exits": costs.tolist(),
    }


def fifths(final: Final, features: Tensor) -> np.ndarray:
    """In which fifth of the images, by the margin of the full encoder's answer, each one is: (N,) from 0 to 4."""
    best = final.soft(features).topk(2, dim=1).values
    margin = (best[:, 0] - best[:, 1]).numpy()
    return np.searchsorted(np.quantile(margin, [0.2, 0.4, 0.6, 0.8]), margin)


def unsteadiness(images: Images, parts: Split) -> list[float]:
    """How often the full encoder's label of a held-out image changes when it is mirrored, by fifths of the margin."""
    changed = (parts.whole["train"] != parts.whole["mirrored"])[parts.held].numpy()
    fifth = fifths(parts.final, images.features["train"][parts.held])
    return [float(changed[fifth == q].mean()) for q in range(5)]


def one_seed(images: Images, parts: Split, setting: str, unpooled: dict[str, Tensor]) -> dict[str, dict]:
    """All rows for one seed."""
    stored: dict[tuple[str, bool], tuple[Collected, float]] = {}
    fitted: dict[tuple, tuple] = {}
    found: dict[str, dict] = {}
    centroid_seconds = 0.0
    everyone = torch.arange(len(images.features["test"]))
    for row in [row for row in ROWS if setting in row.settings]:
        tapped = images.tapped if row.pooled == "pyramid" else images.average
        key = (row.rule, str(row.options), row.pooled, row.budget, row.mirror)
        if key not in fitted:
            if (row.pooled, row.mirror) not in stored:
                began = time.perf_counter()
                stored[row.pooled, row.mirror] = (
                    collected(images, parts, row.pooled, row.mirror),
                    time.perf_counter() - began,
                )
            source, statistics_seconds = stored[row.pooled, row.mirror]
            options = dict(row.options)
            if row.budget is not None:
                options["seconds"] = row.budget * centroid_seconds
            rules = build_rules(row.rule, tapped.seen, K, options)
            if rules[0].sample_images <= 10_000:  # as the library gives it to rules that need no more
                few = slice(0, 10_000)
                source = Collected(
                    source.final,
                    source.statistics,
                    source.descriptors[few],
                    source.labels[few],
                    source.soft[few],
                    0,
                )
            began = time.perf_counter()
            source.fit(tapped, rules, AcrossExits(), parts.seed)
            seconds = time.perf_counter() - began
            if any(rule.needs_scatter for rule in rules):
                seconds += statistics_seconds
            if row.rule == "centroid" and not centroid_seconds:
                centroid_seconds = seconds
            fitted[key] = (
                rules,
                answers(images, row.pooled, rules, "train", parts.held),
                answers(images, row.pooled, rules, "test", everyone),
                seconds,
            )
        rules, on_held, on_test, seconds = fitted[key]
        costs = exit_costs(tapped, rules, parts.final)
        found[row.label] = measure(
            images, parts, setting, rules, on_held, on_test, costs, row.thresholds, row.across
        ) | {"fit_seconds": seconds}
    for label, of, rule_class in (
        ("E2CM, unpooled", E2CMRule, "e2cm"),
        ("E2CM as released, unpooled", E2CMReleasedRule, "released"),
    ):
        sizes = [int(np.prod(d.shape)) for d in images.tapped.descriptors]
        rules = [of(size, K) for size in sizes]
        on_held, on_test = [], []
        for e, rule in enumerate(rules):
            distances = {part: unpooled[part][parts.seed][e] for part in ("train", "test")}
            if rule_class == "e2cm":
                rule.scale.copy_(distances["train"][parts.fit].mean(0))
            on_held.append(rule.of_distances(distances["train"][parts.held]))
            on_test.append(rule.of_distances(distances["test"]))
        staged = images.tapped.staged
        whole = sum(staged.macs) + parts.final.macs
        work = [stage + rule.macs for stage, rule in zip(staged.macs, rules, strict=False)]
        costs = np.cumsum([*work, staged.macs[-1] + parts.final.macs]) / whole
        found[label] = measure(images, parts, setting, rules, on_held, on_test, costs, "exit", AcrossExits()) | {
            "fit_seconds": None
        }
    return found


def distances_on_maps(images: Images, splits: list[Split]) -> dict[str, Tensor]:
    """Distances of every whole map to the mean maps of each seed's labels: part -> (seeds, E, N, K)."""
    e, n = len(images.tapped.descriptors), len(images.pixels["train"])
    onehot = torch.zeros(n, len(splits) * K)  # who counts into which mean
    for s, parts in enumerate(splits):
        onehot[parts.fit, s * K + parts.learnt["train"][parts.fit]] = 1

    def maps(x: Tensor):
        for stage in list(images.tapped.staged.stages)[:-1]:
            x = stage(x)
            yield x.flatten(1)

    means: list[Tensor] = []
    with torch.inference_mode():
        for rows, x in images.batches("train"):
            sums = [onehot[rows].T @ flat for flat in maps(x)]
            means = [a + b for a, b in zip(means, sums, strict=True)] if means else sums
        means = [total / onehot.sum(0)[:, None] for total in means]
        found = {}
        for part in ("train", "test"):
            found[part] = torch.empty(len(splits), e, len(images.pixels[part]), K)
            for rows, x in images.batches(part):
                for i, flat in enumerate(maps(x)):
                    squared = flat.square().sum(1)[:, None] + means[i].square().sum(1) - 2 * flat @ means[i].T
                    found[part][:, i, rows] = squared.clamp(min=0).sqrt().view(-1, len(splits), K).transpose(0, 1)
    return found


def summary(per_seed: list[dict[str, dict]]) -> list[dict]:
    """Mean and standard deviation over seeds, row by row."""
    rows = []
    for label in per_seed[0]:
        each = [found[label] for found in per_seed]

        def spread(values: list) -> dict | None:
            return None if None in values else {"mean": float(np.mean(values)), "std": float(np.std(values))}

        rows.append(
            {
                "rule": label,
                "seeds": len(each),
                "at": {
                    asked: {what: spread([one["at"][asked][what] for one in each]) for what in ("cost", "accuracy")}
                    for asked in each[0]["at"]
                },
                "accuracy_whole": spread([one["accuracy_whole"] for one in each]),
                "fit_seconds": spread([one["fit_seconds"] for one in each]),
                "agreement": [spread(list(values)) for values in zip(*(one["agreement"] for one in each), strict=True)],
                "accuracy": [spread(list(values)) for values in zip(*(one["accuracy"] for one in each), strict=True)],
                **{
                    key: np.mean([one[key] for one in each], axis=0).tolist()
                    for key in ("cost_if_exits_were_free", "cost_of_oracle", "early_by_fifth", "disagreement_by_fifth")
                },
                "agreement_of_exits": np.mean([one["agreement_of_exits"] for one in each], axis=0).tolist(),
                "costs_of_exits": np.mean([one["costs_of_exits"] for one in each], axis=0).tolist(),
            }
        )
    return rows


def table(rows: list[dict]) -> str:
    head = ("rule", *(f"cost at {float(asked):.0%}" for asked in rows[0]["at"]), "accuracy at 98%", "fit s")

    def pm(value: dict | None, digits: int) -> str:
        return "-" if value is None else f"{value['mean']:.{digits}f} ({value['std']:.{digits}f})"

    return text_table(
        head,
        [
            (
                row["rule"],
                *(pm(at["cost"], 3) for at in row["at"].values()),
                pm(row["at"]["0.98"]["accuracy"], 3),
                pm(row["fit_seconds"], 1),
            )
            for row in sorted(rows, key=lambda row: row["at"]["0.98"]["cost"]["mean"])
        ],
    )


def limits(figures: dict) -> str:
    """What stands between a rule and a lower cost."""
    head = ("at 98% agreement", "cost", "exits free", "oracle", "early, by fifths of margin", "disagree, by fifths")
    rows = [
        (
            row["rule"],
            f"{row['at']['0.98']['cost']['mean']:.3f}",
            f"{row['cost_if_exits_were_free']:.3f}",
            f"{row['cost_of_oracle']:.3f}",
            " ".join(f"{v:4.0%}" for v in row["early_by_fifth"]),
            " ".join(f"{v:5.1%}" for v in row["disagreement_by_fifth"]),
        )
        for row in figures["rows"]
        if row["rule"] in SHOWN
    ]
    changes = " ".join(f"{v:.1%}" for v in figures["label_changes_when_mirrored_by_fifth"])
    return f"{text_table(head, rows)}\nthe full encoder's label changes when an image is mirrored, by fifths: {changes}"


SHOWN = (
    "centroid (default)",
    "MLP, 20 passes, mirrored too",
    "MLP x10",
    "SDN x10",
    "BranchyNet x10",
    "EENet x10",
    "E2CM",
)


def draw(figures: dict[str, list[dict]]) -> None:
    """Agreement and accuracy against cost, one column a setting."""
    fig, axes = plt.subplots(2, len(figures), figsize=(4.6 * len(figures), 7), squeeze=False, layout="constrained")
    for column, (setting, rows) in zip(axes.T, figures.items(), strict=True):
        for ax, what in zip(column, ("agreement", "accuracy"), strict=True):
            for row in rows:
                if row["rule"] not in SHOWN:
                    continue
                good = [i for i, value in enumerate(row[what]) if value is not None]
                mean = np.array([row[what][i]["mean"] for i in good])
                std = np.array([row[what][i]["std"] for i in good])
                (line,) = ax.plot(GRID[good], mean, lw=1.5, label=row["rule"])
                ax.fill_between(GRID[good], mean - std, mean + std, color=line.get_color(), alpha=0.2, lw=0)
            ax.set(xlabel="cost (multiply-adds / full encoder)", ylabel=what, title=setting)
            ax.grid(alpha=0.3)
            if what == "agreement":
                ax.set_ylim(0.8, 1.002)
                ax.axhline(0.98, color="0.7", lw=0.8, ls="--")
            else:
                ax.axhline(rows[0]["accuracy_whole"]["mean"], color="0.7", lw=0.8, ls="--")
    fig.legend(*axes[0, 0].get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=1 + len(figures))
    fig.savefig(RESULTS / "rules.png", dpi=110)
    plt.close(fig)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    earlier = RESULTS / "rules.json"
    figures: dict = json.loads(earlier.read_text())["figures"] if earlier.is_file() else {}
    figures = {setting: figures[setting] for setting in SETTINGS if setting in figures and setting not in args.settings}
    for setting in args.settings:
        images = see(setting)
        splits = [split(images, setting, seed) for seed in range(args.seeds)]
        unpooled = distances_on_maps(images, splits)
        per_seed = []
        for parts in splits:
            per_seed.append(one_seed(images, parts, setting, unpooled))
            changes = np.mean([unsteadiness(images, done) for done in splits[: len(per_seed)]], axis=0).tolist()
            figures[setting] = {"rows": summary(per_seed), "label_changes_when_mirrored_by_fifth": changes}
            print(f"\n{setting}, seeds 0 to {parts.seed}\n\n{table(figures[setting]['rows'])}\n")
            print(limits(figures[setting]), flush=True)
            report("rules", figures)
            draw({name: found["rows"] for name, found in figures.items()})


if __name__ == "__main__":
    main()
