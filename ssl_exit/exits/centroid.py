"""Means of the final clusters under one shared metric: the library's default rule."""

from ssl_exit.exits.mahalanobis import MahalanobisRule
from ssl_exit.exits.rules import FitData


class CentroidRule(MahalanobisRule):
    r"""The Mahalanobis distance to the mean of each final cluster, and how large the cluster is.

    logit_k = -1/2 (x - mu_k)^T S^-1 (x - mu_k) + log p_k, less what all clusters share: linear discriminant analysis
    with the final clusters as classes (Hastie, Tibshirani & Friedman, 4.3, equation 4.10). All it needs is a sum
    over images: counts, sums, and one scatter.
    """

    name = "centroid"

    def fit(self, data: FitData) -> None:
        super().fit(data)
        counts = data.statistics.counts
        self.bias += (counts.clamp(min=0.5) / counts.sum()).log().float()
