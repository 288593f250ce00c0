"""Which exits pay for themselves: those whose work costs more than they save are left out."""

from collections.abc import Callable

import numpy as np

from ssl_exit.cascade.cascade import Cascade
from ssl_exit.exits.across import AcrossExits
from ssl_exit.exits.thresholds import Recorded, foretold_agreement, threshold_path, trade_off
from ssl_exit.fitting.record import Logits, fit_temperatures
from ssl_exit.provenance import ExitChoice
from ssl_exit.settings import Settings

LEAST = 0.001  # of the full encoder's cost that an exit must save to be kept


def places_exits(settings: Settings) -> bool:
    """Whether exits are left out that do not pay: not where they were named, nor where they depend on each other
    (patience, ensembling), since without one the others say otherwise."""
    exits = settings.exits
    return (
        isinstance(exits.points, str)
        and exits.points == "auto"
        and not AcrossExits(exits.patience, exits.ensemble).active
    )


def judged(cascade: Cascade, logits: Logits, settings: Settings) -> list[ExitChoice]:
    """Which of the candidate exits pay for themselves, by the logits of held-out images; nothing without any.

    Args:
        cascade: with all candidates and measured times.
        logits: of those images.
        settings: cost and disagreement.
    """
    if len(logits) == 0:
        return []
    _, recorded = fit_temperatures(cascade.rules, cascade.across, logits)
    stage, own = work(cascade, settings.calibration.cost)
    return chosen(cascade.exit_names[:-1], recorded, stage, own, settings.k, settings.max_disagreement)


def work(cascade: Cascade, cost: str) -> tuple[np.ndarray, np.ndarray]:
    """Cost of every stage and of every exit's own work / the full encoder's, (E + 1,) each.

    Args:
        cascade: with measured times.
        cost: "macs" for its multiply-adds, or "time".
    """
    assert cascade.times is not None
    stage, own = cascade.times.stage_seconds, cascade.times.exit_seconds
    own = own + np.append(cascade.times.move_seconds, 0)  # those that stay are moved into the next queue
    if cost == "macs":
        stage = np.array(cascade.tapped.staged.macs, dtype=np.float64)
        own = np.diff(cascade.costs, prepend=0) * (stage.sum() + cascade.final.macs) - stage
    full = stage.sum() + own[-1]
    return stage / full, own / full


def chosen(
    names: list[str], recorded: Recorded, stage: np.ndarray, own: np.ndarray, n_clusters: int, max_disagreement: float
) -> list[ExitChoice]:
    """`choose` by labels and scores of held-out images at all candidates.

    What a set of exits costs is the least mean cost, on these images, of a setting on its threshold path (one
    threshold an exit) that keeps the disagreement within the bound. Rules stay as they were fitted with all candidates.

    Args:
        names: of the candidates, E.
        recorded: labels and scores.
        stage, own: as in `choose`.
        n_clusters: K.
        max_disagreement: what the cascade may disagree by.
    """
    foretold = foretold_agreement(recorded)

    def cost_of(kept: list[int]) -> float:
        costs = costs_with(stage, own, kept)
        part = recorded.at(kept)
        path = threshold_path(
            part, costs, n_clusters, per_cluster=False, steps=12, between=4, surest=0, foretold=foretold[:, kept]
        )
        cost, agreement = trade_off(path, part, costs)
        return float(cost[agreement >= 1 - max_disagreement].min())

    agreement = (recorded.labels == recorded.final[:, None]).mean(0)
    return choose(names, agreement, stage, own, lambda sets: [cost_of(kept) for kept in sets])


def costs_with(stage: np.ndarray, own: np.ndarray, kept: list[int]) -> np.ndarray:
    """Cost of leaving at each of some exits and, last, of the full encoder, where the others are not there."""
    work = np.cumsum(stage)
    return np.append(work[kept] + np.cumsum(own[kept]), work[-1] + own[kept].sum() + own[-1])


def choose(
    names: list[str],
    agreement: np.ndarray,
    stage: np.ndarray,
    own: np.ndarray,
    costs_of: Callable[[list[list[int]]], list[float]],
) -> list[ExitChoice]:
    """Backward elimination: leave out the exit that is missed least, as long as that costs less than `LEAST`.

    Args:
        names: of the candidates, E.
        agreement: of the label of each with the full encoder's, (E,).
        stage: cost of each stage / of the full encoder, (E + 1,).
        own: cost of each exit's own work / the full encoder's, (E + 1,); the last is the final assignment's.
        costs_of: the mean cost with each of several sets of candidates.

    Returns:
        One choice a candidate, in their order; at least one is kept.
    """
    kept = list(range(len(names)))
    (now,) = costs_of([kept])
    while len(kept) > 1:
        without = dict(zip(kept, costs_of([[j for j in kept if j != i] for i in kept]), strict=True))
        least = min(kept, key=lambda i: without[i])
        if without[least] - now >= LEAST:
            break
        kept.remove(least)
        now = without[least]
    others = [sorted({*kept} ^ {i}) for i in range(len(names))]
    cost_of_other = iter(costs_of([other for other in others if other]))
    full = np.cumsum(stage) + np.cumsum(own)
    choices = []
    for i, (name, other) in enumerate(zip(names, others, strict=True)):
        saving = (next(cost_of_other) if other else 1.0) - now
        saving = saving if i in kept else -saving
        choices.append(ExitChoice(name, float(full[i]), float(own[i]), float(agreement[i]), float(saving), i in kept))
    return choices
