"""Means of the final clusters under Euclidean distance, plain and as in E2CM."""

import torch
from torch import Tensor

from ssl_exit.exits.rules import ExitRule, squared_distances
from ssl_exit.exits.statistics import ClusterStatistics


class EuclideanRule(ExitRule):
    """Negative squared Euclidean distance to the mean of each final cluster; one without images is never near."""

    name = "euclidean"
    means: Tensor
    absent: Tensor

    def __init__(self, dim: int, n_clusters: int) -> None:
        super().__init__(dim, n_clusters)
        self.register_buffer("means", torch.zeros(n_clusters, dim))
        self.register_buffer("absent", torch.zeros(n_clusters))

    def fit(self, statistics: ClusterStatistics, sample: Tensor, labels: Tensor, seed: int) -> None:
        self.means.copy_(statistics.means)
        self.absent.copy_(1e9 * (statistics.counts == 0))

    def logits(self, x: Tensor) -> Tensor:
        return -squared_distances(x, self.means) - self.absent

    @property
    def macs(self) -> int:
        return (self.n_clusters + 1) * self.dim


class E2CMRule(EuclideanRule):
    """E2CM without labels, after Gormez, Dasari & Koyuncu (arXiv 2103.01148).

    The distance to each mean is divided by the mean training distance to it, here that of the images of its
    own cluster; the softmax of the negative is the score.
    """

    name = "e2cm"
    scale: Tensor

    def __init__(self, dim: int, n_clusters: int) -> None:
        super().__init__(dim, n_clusters)
        self.register_buffer("scale", torch.ones(n_clusters))

    def fit(self, statistics: ClusterStatistics, sample: Tensor, labels: Tensor, seed: int) -> None:
        super().fit(statistics, sample, labels, seed)
        distances = squared_distances(sample, self.means).sqrt().gather(1, labels[:, None])[:, 0]
        counts = torch.bincount(labels, minlength=self.n_clusters)
        sums = torch.zeros(self.n_clusters).index_add_(0, labels, distances)
        overall = distances.mean().clamp(min=1e-12)
        self.scale.copy_(torch.where((counts > 0) & (sums > 0), sums / counts.clamp(min=1), overall))

    def logits(self, x: Tensor) -> Tensor:
        return -squared_distances(x, self.means).sqrt() / self.scale - self.absent
