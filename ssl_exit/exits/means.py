"""Means of the final clusters (or classes) under Euclidean distance."""

import torch
from torch import Tensor

from ssl_exit.exits.rules import ExitRule, FitData, squared_distances


class EuclideanRule(ExitRule):
    """Negative squared Euclidean distance to the mean of each final cluster; one without images is never near."""

    name = "euclidean"
    sample_images = 0
    means: Tensor
    absent: Tensor

    def __init__(self, dim: int, n_clusters: int) -> None:
        super().__init__(dim, n_clusters)
        self.register_buffer("means", torch.zeros(n_clusters, dim))
        self.register_buffer("absent", torch.zeros(n_clusters))

    def fit(self, data: FitData) -> None:
        self.means.copy_(data.statistics.means)
        self.absent.copy_(1e9 * (data.statistics.counts == 0))

    def logits(self, x: Tensor) -> Tensor:
        return -squared_distances(x, self.means) - self.absent

    @property
    def macs(self) -> int:
        return (self.n_clusters + 1) * self.dim
