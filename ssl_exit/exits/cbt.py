"""Class based thresholding (CBT): one threshold a cluster, from the mean prediction probabilities."""

import numpy as np

from ssl_exit.exits.thresholds import NEVER, Recorded, trade_off

WIDTHS = (0.0, 0.5, 1.0, 2.0, 4.0)  # distances from the lower to the upper bound that are tried, in log-odds
STEPS = 400


def cbt_thresholds(mean_probabilities: np.ndarray, lower: float, upper: float) -> np.ndarray:
    """Thresholds between two bounds: the lower for the cluster that is easiest to predict.

    Gormez & Koyuncu, Class Based Thresholding (arXiv 2210.15621): with P_k the mean prediction probabilities
    over the images of class k and all exits, a class is easy where the gap g_k between the largest and the second
    largest entry of P_k is wide; gaps are scaled to T_k = upper - (upper - lower) (g_k - min g) / (max g - min g).

    Args:
        mean_probabilities: P, (K, K), a row a cluster.
        lower: threshold of the easiest cluster.
        upper: threshold of the hardest.

    Returns:
        Thresholds, (K,); all `upper` where no cluster is easier than another.
    """
    largest = np.sort(mean_probabilities, axis=1)
    gap = largest[:, -1] - (largest[:, -2] if largest.shape[1] > 1 else 0)
    spread = gap.max() - gap.min()
    ease = (gap - gap.min()) / spread if spread > 0 else np.zeros(len(gap))
    return upper - (upper - lower) * ease


def cbt_path(recorded: Recorded, costs: np.ndarray, mean_probabilities: np.ndarray) -> np.ndarray:
    """Settings from "never exit" to "always exit at the first": bounds that fall together.

    The paper sets the two bounds by hand. Here their distance, in log-odds, is the one of `WIDTHS` that costs least,
    averaged over agreements from 0.9 to 0.99 on the recorded images.

    Args:
        recorded: images that shape the path.
        costs: cost of leaving at each exit and, last, of the full encoder, (E + 1,).
        mean_probabilities: mean probabilities at each exit by final cluster, (E, K, K).

    Returns:
        Thresholds, (S, E, K) float32; the same for all exits.
    """
    mean = mean_probabilities.mean(0)
    e, k = mean_probabilities.shape[:2]
    seen = recorded.scores[np.isfinite(recorded.scores)]
    if len(seen) == 0:
        return np.stack([np.full((e, k), NEVER), np.zeros((e, k))]).astype(np.float32)
    lowers = np.unique(np.quantile(seen, np.linspace(0, 1, STEPS)))[::-1]
    best, least = None, np.inf
    for width in WIDTHS:
        rows = [cbt_thresholds(mean, lower, _further(lower, width)) for lower in lowers]
        path = np.stack([np.full(k, NEVER), *rows, np.zeros(k)])[:, None].repeat(e, axis=1).astype(np.float32)
        cost, agreement = trade_off(path, recorded, costs)
        mean_cost = np.mean([cost[agreement >= asked].min() for asked in (0.9, 0.95, 0.98, 0.99)])
        if mean_cost < least:
            best, least = path, mean_cost
    assert best is not None
    return best


def _further(p: float, width: float) -> float:
    """The probability whose log-odds are larger by `width`."""
    inside = np.clip(p, 1e-9, 1 - 1e-9)
    return float(1 / (1 + (1 - inside) / inside * np.exp(-width)))
