"""Which exits pay for themselves: those whose work costs more than they save are left out."""

from dataclasses import dataclass

import numpy as np

from ssl_exit.exits.thresholds import Recorded, foretold_agreement, threshold_path, trade_off

LEAST = 0.001  # of the whole encoder's cost that an exit must save to be kept


@dataclass(frozen=True)
class ExitChoice:
    """Why an exit was kept or left out.

    Attributes:
        name: of the exit point.
        cost: of leaving here, with all candidates in place / the whole encoder's.
        own_work: of that, what the exit itself costs.
        agreement: of its label with the whole encoder's, all held-out images.
        saving: how much more the cascade would cost without this exit, for one that is kept; how much less it would
            cost with it, for one that is left out (negative: more).
        kept: whether it stays.
    """

    name: str
    cost: float
    own_work: float
    agreement: float
    saving: float
    kept: bool

    def __str__(self) -> str:
        verdict = "kept, saves" if self.kept else "left out, would save"
        return (
            f"{self.name}: {verdict} {self.saving:.1%} of the whole encoder's cost after its own work of "
            f"{self.own_work:.1%}; its label agrees on {self.agreement:.1%} of held-out images"
        )


def choose(
    names: list[str], recorded: Recorded, stage: np.ndarray, own: np.ndarray, n_clusters: int, max_disagreement: float
) -> list[ExitChoice]:
    """Backward elimination: leave out the exit that is missed least, as long as that costs less than `LEAST`.

    What a set of exits costs is the least mean cost, on these images, of a setting on its threshold path (one
    threshold an exit) that keeps the disagreement within the bound. Rules stay as they were fitted with all candidates.

    Args:
        names: of the candidates, E.
        recorded: labels and scores of held-out images at all candidates.
        stage: cost of each stage / of the whole encoder, (E + 1,).
        own: cost of each exit's own work / the whole encoder's, (E + 1,); the last is the final assignment's.
        n_clusters: K.
        max_disagreement: what the cascade may disagree by.

    Returns:
        One choice a candidate, in their order; at least one is kept.
    """

    foretold = foretold_agreement(recorded)

    def cost_of(kept: list[int]) -> float:
        work = np.cumsum(stage)
        costs = np.append(work[kept] + np.cumsum(own[kept]), work[-1] + own[kept].sum() + own[-1])
        part = Recorded(recorded.labels[:, kept], recorded.scores[:, kept], recorded.final)
        path = threshold_path(
            part, costs, n_clusters, per_cluster=False, steps=12, between=4, foretold=foretold[:, kept]
        )
        cost, agreement = trade_off(path, part, costs)
        return float(cost[agreement >= 1 - max_disagreement].min())

    kept = list(range(len(names)))
    now = cost_of(kept)
    while len(kept) > 1:
        without = {i: cost_of([j for j in kept if j != i]) for i in kept}
        least = min(kept, key=lambda i: without[i])
        if without[least] - now >= LEAST:
            break
        kept.remove(least)
        now = without[least]
    agreement = (recorded.labels == recorded.final[:, None]).mean(0)
    whole = np.cumsum(stage) + np.cumsum(own)
    choices = []
    for i, name in enumerate(names):
        other = sorted({*kept} ^ {i})
        saving = (cost_of(other) if other else 1.0) - now if i in kept else now - cost_of(other)
        choices.append(ExitChoice(name, float(whole[i]), float(own[i]), float(agreement[i]), float(saving), i in kept))
    return choices
