"""Mahalanobis distance to the means of the final clusters, under one covariance shared by all."""

import torch
from torch import Tensor

from ssl_exit.exits.rules import ExitRule, FitData


class MahalanobisRule(ExitRule):
    r"""The nearest mean in the Mahalanobis distance of the within-cluster covariance S.

    -1/2 (x - mu_k)^T S^-1 (x - mu_k), less what all clusters share, is linear in x: w_k = S^-1 mu_k and
    b_k = -1/2 mu_k^T S^-1 mu_k, so an exit costs K x D multiply-adds (Hastie, Tibshirani & Friedman, The Elements
    of Statistical Learning, 4.3). S is shrunk towards its diagonal by `oas_shrinkage`.
    """

    name = "mahalanobis"
    needs_scatter = True
    sample_images = 0
    weight: Tensor
    bias: Tensor

    def __init__(self, dim: int, n_clusters: int) -> None:
        super().__init__(dim, n_clusters)
        self.register_buffer("weight", torch.zeros(n_clusters, dim))
        self.register_buffer("bias", torch.zeros(n_clusters))

    def fit(self, data: FitData) -> None:
        statistics = data.statistics
        covariance = statistics.within_covariance
        deviation = covariance.diagonal().clamp(min=0).sqrt()
        constant = deviation <= 1e-6 * deviation.max().clamp(min=1e-30)  # an entry that never varies says nothing
        deviation = torch.where(constant, torch.inf, deviation)
        correlation = covariance / deviation[:, None] / deviation
        correlation.diagonal().fill_(1)
        rho = oas_shrinkage(correlation, int(statistics.counts.sum()))
        correlation = (1 - rho) * correlation
        correlation.diagonal().fill_(1)

        means = (statistics.means - statistics.mean) / deviation  # (K, D), whitened entry by entry
        solved = torch.linalg.solve(correlation, means.T).T
        weight = solved / deviation
        self.weight.copy_(weight)
        absent = 1e9 * (statistics.counts == 0)  # never near
        self.bias.copy_(-(solved * means).sum(1) / 2 - weight @ statistics.mean - absent)

    def logits(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight.T)

    @property
    def macs(self) -> int:
        return self.n_clusters * self.dim


def oas_shrinkage(covariance: Tensor, n: int) -> float:
    """Oracle-approximating shrinkage intensity (Chen et al., arXiv 0907.4698, equation 23).

    Args:
        covariance: sample covariance, (D, D); its target is a multiple of the identity.
        n: number of images behind it.

    Returns:
        The weight of the target, in [0, 1].
    """
    d = len(covariance)
    square, trace = float(covariance.square().sum()), float(covariance.trace())
    above = (1 - 2 / d) * square + trace**2
    below = (n + 1 - 2 / d) * (square - trace**2 / d)
    return 1.0 if below <= 0 else min(1.0, above / below)
