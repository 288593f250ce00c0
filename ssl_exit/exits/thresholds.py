"""Thresholds per exit and cluster: what a setting does to stored scores, and a path of settings."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import pairwise

import numpy as np

NEVER = np.inf


@dataclass(frozen=True)
class Recorded:
    """What every exit says of held-out images, and what the full encoder says.

    Attributes:
        labels: label at each exit, (N, E) int64.
        scores: score at each exit, (N, E) in [0, 1] or NaN.
        final: label of the full encoder, (N,) int64.
    """

    labels: np.ndarray
    scores: np.ndarray
    final: np.ndarray

    def __len__(self) -> int:
        return len(self.final)

    @classmethod
    def empty(cls, n_exits: int) -> "Recorded":
        """Of no images."""
        return cls(np.empty((0, n_exits), np.int64), np.empty((0, n_exits), np.float32), np.empty(0, np.int64))

    @classmethod
    def joined(cls, parts: Sequence["Recorded"]) -> "Recorded":
        """Of the images of all parts."""
        return cls(*(np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(cls)))

    def at(self, exits: Sequence[int]) -> "Recorded":
        """The same for some of the exits."""
        return Recorded(self.labels[:, exits], self.scores[:, exits], self.final)

    def __add__(self, other: "Recorded") -> "Recorded":
        """Of the images of both."""
        return Recorded.joined([self, other])


def simulate(recorded: Recorded, thresholds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What the cascade would answer: each image leaves at the first exit with score >= threshold.

    Args:
        recorded: N images, E exits.
        thresholds: per exit and cluster, (E, K).

    Returns:
        Labels, (N,) int64, and exits, (N,) int64; exit E is the end of the encoder.
    """
    exits = _exits(recorded, thresholds, _cells(recorded, thresholds))
    with_end = np.column_stack([recorded.labels, recorded.final])
    return with_end[np.arange(len(exits)), exits], exits


def trade_off(path: np.ndarray, recorded: Recorded, costs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean cost and agreement of every setting of a path: thresholds (S, E, K), costs (E + 1,) -> (S,), (S,)."""
    agrees = np.column_stack([recorded.labels == recorded.final[:, None], np.ones(len(recorded), dtype=bool)])
    cells = _cells(recorded, path[0])
    every = [_exits(recorded, thresholds, cells) for thresholds in path]
    agreement = [agrees[np.arange(len(exits)), exits].mean() for exits in every]
    return np.array([costs[exits].mean() for exits in every]), np.array(agreement)


def _cells(recorded: Recorded, thresholds: np.ndarray) -> np.ndarray:
    """Where in the flattened thresholds, (E, K), each image's own is at each exit, (N, E)."""
    e, k = thresholds.shape
    return recorded.labels + k * np.arange(e)


def _exits(recorded: Recorded, thresholds: np.ndarray, cells: np.ndarray) -> np.ndarray:
    """The first exit whose threshold each image passes, (N,) int64; E: none."""
    leaves = np.ones((len(recorded), len(thresholds) + 1), dtype=bool)
    np.greater_equal(recorded.scores, thresholds.ravel()[cells], out=leaves[:, :-1])  # NaN never leaves
    return leaves.argmax(1)


def threshold_path(
    recorded: Recorded,
    costs: np.ndarray,
    n_clusters: int,
    *,
    per_cluster: bool = True,
    steps: int = 40,
    between: int = 24,
    surest: int = 8,
    foretold: np.ndarray | None = None,
) -> np.ndarray:
    """Settings from "never exit" to "always exit at the first", cheaper and less sure step by step.

    For a price lambda on disagreement, `_best_thresholds` minimises mean(cost) + lambda mean(disagreement).
    The path visits falling prices and interpolates thresholds between neighbours in log-odds.

    Args:
        recorded: images that shape the path.
        costs: cost of leaving at each exit and, last, of the full encoder, (E + 1,).
        n_clusters: K.
        per_cluster: a threshold for every exit and cluster; otherwise one for every exit.
        steps: number of prices from 100 down to 0.3.
        between: settings from one price to the next.
        surest: further prices from 10,000 to 100: where few images certify, all that passes may lie there.
        foretold: what `foretold_agreement` says of those images, (N, E), if that is known already.

    Returns:
        Thresholds, ((surest + steps + 1) * between + 1, E, K) float32; inf = never.
    """
    e = recorded.labels.shape[1]
    best = np.full((e, n_clusters), NEVER)
    knots = [best]
    foretold = foretold_agreement(recorded) if foretold is None else foretold
    loss = ((recorded.labels != recorded.final[:, None]) + 1 - foretold) / 2
    groups = [_ranked(*columns, per_cluster) for columns in zip(recorded.labels.T, recorded.scores.T, strict=True)]
    prices = [*np.geomspace(1e4, 100.0, surest + 1)[:-1], *np.geomspace(100.0, 0.3, steps)]
    for price in prices:
        best = _best_thresholds(recorded, loss, costs, price, best, groups)
        knots.append(best)
    knots.append(np.zeros((e, n_clusters)))
    path = np.empty((between * (len(knots) - 1) + 1, e, n_clusters), dtype=np.float32)
    parts = ((a, b, u) for a, b in pairwise(map(_log_odds, knots)) for u in np.arange(between) / between)
    for i, (a, b, u) in enumerate(parts):
        path[i] = _from_log_odds((1 - u) * a + u * b)
    path[-1] = knots[-1]
    return path


def foretold_agreement(recorded: Recorded) -> np.ndarray:
    """Probability that each exit's label agrees, as its score foretells it: (N, E) in [0, 1], rising with the score.

    One logistic regression an exit on the log-odds of the score (Platt scaling), so that rules may score on any
    scale. NaN scores foretell 0.
    """
    from sklearn.linear_model import LogisticRegression

    agrees = recorded.labels == recorded.final[:, None]
    foretold = np.zeros(recorded.scores.shape)
    for exit_ in range(recorded.labels.shape[1]):
        usable = np.isfinite(recorded.scores[:, exit_])
        z, target = _log_odds(recorded.scores[usable, exit_].astype(np.float64)), agrees[usable, exit_]
        p = np.full(len(z), target.mean() if len(z) else 0.0)
        if 0 < target.sum() < len(target) and np.ptp(z) > 0:
            scaled = (z - z.mean())[:, None] / z.std()
            regression = LogisticRegression(C=100.0).fit(scaled, target)
            if regression.coef_[0, 0] > 0:
                p = regression.predict_proba(scaled)[:, 1]
        foretold[usable, exit_] = p
    return foretold


Groups = list[tuple[int | slice, np.ndarray]]  # clusters that share a threshold, and their images by falling score


def _ranked(labels: np.ndarray, scores: np.ndarray, per_cluster: bool) -> Groups:
    """The images of one exit that have a score, (N,) each, group by group."""
    order = np.argsort(-scores, kind="stable")
    order = order[np.isfinite(scores[order])]
    if not per_cluster:
        return [(slice(None), order)]
    return [(int(cluster), order[labels[order] == cluster]) for cluster in np.unique(labels[order])]


def _best_thresholds(
    recorded: Recorded,
    loss: np.ndarray,
    costs: np.ndarray,
    price: float,
    start: np.ndarray,
    groups: list[Groups],
    sweeps: int = 3,
) -> np.ndarray:
    """Coordinate descent on mean(cost) + price * mean(loss), exit by exit from the last to the first.

    The loss of leaving, (N, E), counts a disagreement half as seen and half as the score foretells: with a
    hundred thresholds, counting only what was seen finds thresholds just above the worst image seen.
    """
    labels, scores = recorded.labels, recorded.scores
    n, e = labels.shape
    thresholds = start.copy()
    for _ in range(sweeps):
        leaves = scores >= thresholds[np.arange(e), labels]
        reached = np.column_stack([np.ones(n, dtype=bool), ~np.logical_or.accumulate(leaves, axis=1)[:, :-1]])
        onward_cost, onward_loss = np.full(n, costs[-1]), np.zeros(n)  # of going on from this exit
        for exit_ in reversed(range(e)):
            gain = onward_cost - costs[exit_] - price * (loss[:, exit_] - onward_loss)
            here = reached[:, exit_]
            for clusters, ranked in groups[exit_]:
                order = ranked[here[ranked]]
                if len(order):
                    thresholds[exit_, clusters] = _best_cut(scores[order, exit_], gain[order])
            go = scores[:, exit_] >= thresholds[exit_, labels[:, exit_]]
            onward_cost = np.where(go, costs[exit_], onward_cost)
            onward_loss = np.where(go, loss[:, exit_], onward_loss)
    return thresholds


def _best_cut(scores: np.ndarray, gain: np.ndarray) -> float:
    """The threshold whose leavers gain most in all; scores fall. Midway to the next, so rounding moves no one."""
    total = np.cumsum(gain)
    distinct = np.append(scores[1:] < scores[:-1], True)  # equal scores leave together
    last = int(np.where(distinct, total, -np.inf).argmax())
    if total[last] <= 0:
        return NEVER
    return float(scores[last] + scores[last + 1]) / 2 if last + 1 < len(scores) else float(scores[last])


_SUREST = 1 - 1e-6  # no finite threshold above it: closer to 1, rounding would decide
_FAR = 25.0  # log-odds beyond which a score is 0 or 1 and a threshold means always or never


def _log_odds(thresholds: np.ndarray) -> np.ndarray:
    inside = np.clip(thresholds, 1e-10, 1 - 1e-10)  # a finite threshold, 1 too, stays one
    z = np.log(inside) - np.log1p(-inside)
    return np.where(thresholds > 1, _FAR, np.where(thresholds <= 0, -_FAR, z))


def _from_log_odds(z: np.ndarray) -> np.ndarray:
    return np.where(z >= _FAR, NEVER, np.where(z <= -_FAR, 0.0, np.minimum(1 / (1 + np.exp(-z)), _SUREST)))
