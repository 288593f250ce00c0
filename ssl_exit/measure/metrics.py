"""How two labellings of the same images compare. Ground truth is used here and nowhere else."""

import numpy as np


def agreement(labels: np.ndarray, full: np.ndarray) -> float:
    """Share of images whose label equals the full encoder's; both (N,)."""
    return float(np.mean(labels == full))


def clustering_accuracy(labels: np.ndarray, targets: np.ndarray) -> float:
    """ACC: accuracy under the best one-to-one matching of clusters to classes; both (N,).

    >>> clustering_accuracy(np.array([1, 1, 0, 0]), np.array([0, 0, 1, 0]))
    0.75
    """
    from scipy.optimize import linear_sum_assignment
    from sklearn.metrics.cluster import contingency_matrix

    counts = contingency_matrix(targets, labels)
    return float(counts[linear_sum_assignment(counts, maximize=True)].sum() / len(labels))


def against_targets(labels: np.ndarray, targets: np.ndarray, classes: bool = False) -> dict[str, float]:
    """ACC, normalised mutual information (arithmetic mean) and adjusted Rand index; both (N,).

    Where labels are classes already, ACC is plain accuracy: nothing is matched.
    """
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

    return {
        "acc": agreement(labels, targets) if classes else clustering_accuracy(labels, targets),
        "nmi": float(normalized_mutual_info_score(targets, labels)),
        "ari": float(adjusted_rand_score(targets, labels)),
    }
