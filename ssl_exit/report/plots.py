"""Pictures: what leaves where, and what agreement costs."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from ssl_exit.measure.evaluation import Evaluation

PER_EXIT = 12  # sample images a row


def plot_exits(
    file: Path, evaluation: Evaluation, pictures: np.ndarray, curve: tuple[np.ndarray, np.ndarray], title: str
) -> None:
    """Sample images of each exit, beside the cost-agreement curve with the setting in use.

    Args:
        file: where to write; PNG, SVG or PDF by its ending.
        evaluation: of the images shown.
        pictures: the images, (N, H, W) or (N, H, W, 3), in [0, 1].
        curve: cost and agreement of every setting on the threshold path, (S,) each.
        title: one line over all.
    """
    rows = [(e, row) for e, row in enumerate(evaluation.exits) if row.share > 0]
    fig = Figure(figsize=(12, max(3.4, 0.62 * len(rows) + 1.2)), layout="constrained")
    left, right = np.asarray(fig.subfigures(1, 2, width_ratios=[1.5, 1]))
    axes = np.atleast_2d(left.subplots(len(rows), PER_EXIT))
    for line, (e, row) in zip(axes, rows, strict=True):
        members = np.flatnonzero((evaluation.result.exits == e) & (evaluation.result.labels >= 0))
        shown: Sequence[int] = np.random.default_rng(0).permutation(members)[:PER_EXIT].tolist()
        for ax, i in zip(line, [*shown, *[None] * (PER_EXIT - len(shown))], strict=True):
            ax.set_axis_off()
            if i is not None:
                ax.imshow(pictures[i], cmap="gray_r", vmin=0, vmax=1)
        text = f"{row.name}  cost {row.cost:.2f}\n{row.share:.1%} leave, {row.agreement:.1%} agree"
        line[0].text(-0.25, 0.5, text, transform=line[0].transAxes, ha="right", va="center", fontsize=8)
    left.suptitle("what leaves where", fontsize=10)

    ax = right.subplots()
    costs, agreements = curve
    ax.plot(costs, agreements, color="tab:blue", lw=1.5, label="threshold path")
    ax.plot(evaluation.cost_macs, evaluation.agreement, "o", color="tab:red", label="setting in use")
    ax.axvline(1, color="0.7", lw=0.8, ls="--")
    ax.set(xlabel="cost (multiply-adds / full encoder)", ylabel="agreement with the full encoder", xlim=(0, 1.1))
    ax.grid(alpha=0.3)
    ax.legend(loc="lower right", fontsize=8)
    fig.suptitle(title, fontsize=11)
    fig.savefig(file, dpi=130)


def plot_federated(file: Path, composition: np.ndarray, results: Mapping[str, Mapping[str, float]]) -> None:
    """What clients have, beside what fits cost and how good their labels are.

    Args:
        file: where to write; PNG, SVG or PDF by its ending.
        composition: images of every client and class, (M, C).
        results: of each fit "cost_macs", "agreement" and "acc"; empty ones are left out.
    """
    fig = Figure(figsize=(11, 3.8), layout="constrained")
    left, right = fig.subplots(1, 2, width_ratios=[1.3, 1])
    clients, bottom = np.arange(len(composition)), np.zeros(len(composition))
    for cls, column in enumerate(composition.T):
        left.bar(clients, column, bottom=bottom, color=f"C{cls % 10}", width=0.85, label=f"{cls}")
        bottom += column
    left.set(xlabel="client", ylabel="images", title="images of every client, by class", xticks=clients)
    left.legend(fontsize=7, ncols=2, title="class", title_fontsize=7)

    shown = {name: one for name, one in results.items() if one}
    measures = {"cost_macs": "cost (multiply-adds)", "agreement": "agreement", "acc": "ACC"}
    for i, (name, one) in enumerate(shown.items()):
        at = np.arange(len(measures)) + 0.27 * (i - (len(shown) - 1) / 2)
        bars = right.bar(at, [one[key] for key in measures], width=0.25, label=name)
        right.bar_label(bars, fmt="%.2f", fontsize=7)
    right.set(xticks=np.arange(len(measures)), xticklabels=measures.values(), ylim=(0, 1.15), title="test images")
    right.legend(fontsize=8, loc="upper left", ncols=3)
    fig.savefig(file, dpi=130)
