"""Thresholds per exit and cluster: what a setting does to stored scores, and a path of settings."""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

NEVER = np.inf


@dataclass(frozen=True)
class Recorded:
    """What every exit says of held-out images, and what the whole encoder says.

    Attributes:
        labels: label at each exit, (N, E) int64.
        scores: score at each exit, (N, E) in [0, 1] or NaN.
        final: label of the whole encoder, (N,) int64.
    """

    labels: np.ndarray
    scores: np.ndarray
    final: np.ndarray

    def __len__(self) -> int:
        return len(self.final)


def simulate(recorded: Recorded, thresholds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What the cascade would answer: each image leaves at the first exit with score >= threshold.

    Args:
        recorded: N images, E exits.
        thresholds: per exit and cluster, (E, K).

    Returns:
        Labels, (N,) int64, and exits, (N,) int64; exit E is the end of the encoder.
    """
    n, e = recorded.labels.shape
    leaves = recorded.scores >= thresholds[np.arange(e), recorded.labels]  # NaN never leaves
    exits = np.where(leaves.any(1), leaves.argmax(1), e) if e else np.zeros(n, dtype=np.int64)
    with_end = np.column_stack([recorded.labels, recorded.final])
    return with_end[np.arange(n), exits], exits


def trade_off(path: np.ndarray, recorded: Recorded, costs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean cost and agreement of every setting of a path: thresholds (S, E, K), costs (E + 1,) -> (S,), (S,)."""
    answers = [simulate(recorded, thresholds) for thresholds in path]
    cost = np.array([costs[exits].mean() for _, exits in answers])
    return cost, np.array([(labels == recorded.final).mean() for labels, _ in answers])


def threshold_path(
    recorded: Recorded, costs: np.ndarray, n_clusters: int, steps: int = 40, between: int = 24
) -> np.ndarray:
    """Settings from "never exit" to "always exit at the first", cheaper and less sure step by step.

    For a price lambda on disagreement, `_best_thresholds` minimises mean(cost) + lambda mean(disagreement).
    The path visits falling prices and interpolates thresholds between neighbours in log-odds.

    Args:
        recorded: images that shape the path.
        costs: cost of leaving at each exit and, last, of the whole encoder, (E + 1,).
        n_clusters: K.
        steps: number of prices.
        between: settings from one price to the next.

    Returns:
        Thresholds, (steps * between + between + 1, E, K) float32; inf = never.
    """
    e = recorded.labels.shape[1]
    best = np.full((e, n_clusters), NEVER)
    knots = [best]
    for price in np.geomspace(100.0, 0.3, steps):
        best = _best_thresholds(recorded, costs, price, best)
        knots.append(best)
    knots.append(np.zeros((e, n_clusters)))
    odds = [_log_odds(knot) for knot in knots]
    path = [(1 - u) * a + u * b for a, b in pairwise(odds) for u in np.arange(between) / between]
    settings = [_from_log_odds(z) for z in path]
    return np.stack([*settings, knots[-1]]).astype(np.float32)


def _best_thresholds(
    recorded: Recorded, costs: np.ndarray, price: float, start: np.ndarray, sweeps: int = 3
) -> np.ndarray:
    """Coordinate descent on mean(cost) + price * mean(disagreement), exit by exit from the last to the first.

    Whether an image that leaves would disagree is counted half as seen and half as its score foretells:
    with a hundred thresholds, counting only what was seen finds thresholds just above the worst image seen.
    """
    labels, scores, final = recorded.labels, recorded.scores, recorded.final
    n, e = labels.shape
    thresholds = start.copy()
    for _ in range(sweeps):
        leaves = scores >= thresholds[np.arange(e), labels]
        reached = np.column_stack([np.ones(n, dtype=bool), ~np.logical_or.accumulate(leaves, axis=1)[:, :-1]])
        onward_cost, onward_loss = np.full(n, costs[-1]), np.zeros(n)  # of going on from the exit at hand
        for exit_ in reversed(range(e)):
            loss = ((labels[:, exit_] != final) + 1 - scores[:, exit_]) / 2
            gain = onward_cost - costs[exit_] - price * (loss - onward_loss)
            usable = reached[:, exit_] & np.isfinite(scores[:, exit_])
            for cluster in np.unique(labels[usable, exit_]):
                members = np.flatnonzero(usable & (labels[:, exit_] == cluster))
                order = members[np.argsort(-scores[members, exit_], kind="stable")]
                thresholds[exit_, cluster] = _best_cut(scores[order, exit_], gain[order])
            go = scores[:, exit_] >= thresholds[exit_, labels[:, exit_]]
            onward_cost = np.where(go, costs[exit_], onward_cost)
            onward_loss = np.where(go, loss, onward_loss)
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
    inside = np.clip(thresholds, 1e-12, 1 - 1e-12)
    z = np.log(inside) - np.log1p(-inside)
    return np.where(thresholds > 1, _FAR, np.where(thresholds <= 0, -_FAR, z))


def _from_log_odds(z: np.ndarray) -> np.ndarray:
    return np.where(z >= _FAR, NEVER, np.where(z <= -_FAR, 0.0, np.minimum(1 / (1 + np.exp(-z)), _SUREST)))
