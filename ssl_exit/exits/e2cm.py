"""E2CM: early exit via class means, as in the paper and as in its authors' released code."""

import torch
from torch import Tensor

from ssl_exit.exits.means import EuclideanRule
from ssl_exit.exits.rules import FitData, squared_distances


class E2CMRule(EuclideanRule):
    r"""Distances to the means, each divided by the mean training distance to it; softmax of the negative.

    Gormez, Dasari & Koyuncu (arXiv 2103.01148): with d_k = |x - mu_k|, mu_k the mean of class (or final cluster) k
    at this exit, and D_k the mean of d_k over all training images, p = softmax(-d / D); an image leaves when
    max_k p_k >= the threshold of the layer. D_k is taken over the sample that `FitData` holds. No temperature
    is fitted: the score is the paper's.
    """

    name = "e2cm"
    sample_images = 10_000
    calibrated = False
    scale: Tensor

    def __init__(self, dim: int, n_clusters: int) -> None:
        super().__init__(dim, n_clusters)
        self.register_buffer("scale", torch.ones(n_clusters))

    def fit(self, data: FitData) -> None:
        super().fit(data)
        total = torch.zeros(self.n_clusters)
        for part in data.sample.split(4096):
            total += squared_distances(part, self.means).sqrt().sum(0)
        self.scale.copy_((total / len(data.sample)).clamp(min=1e-12))

    def logits(self, x: Tensor) -> Tensor:
        return self.of_distances(squared_distances(x, self.means).sqrt())

    def of_distances(self, distances: Tensor) -> Tensor:
        """Logits of the distances to the means, (N, K) -> (N, K)."""
        return -distances / self.scale - self.absent


class E2CMReleasedRule(EuclideanRule):
    r"""E2CM as released by its authors: distances divided by the image's largest; softmax of the negative.

    The released code takes distances on the whole map (`descriptor="flatten"`) and divides them by the largest
    one, d_k / max_j d_j. Every ratio then lies in [0, 1], so the score cannot exceed 1 / (1 + (K - 1) / e), about
    0.232 for K = 10, however sure the rule is: a threshold above that lets nothing exit.
    """

    name = "e2cm_released"
    calibrated = False

    def logits(self, x: Tensor) -> Tensor:
        return self.of_distances(squared_distances(x, self.means).sqrt())

    def of_distances(self, distances: Tensor) -> Tensor:
        """Logits of the distances to the means, (N, K) -> (N, K)."""
        largest = torch.where(self.absent > 0, 0, distances).max(1, keepdim=True).values
        return -distances / largest.clamp(min=1e-12) - self.absent
