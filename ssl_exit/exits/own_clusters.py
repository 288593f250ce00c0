"""FAISS k-means in the descriptor space of each exit: clusters of the layer's own, tied to the final ones."""

import numpy as np
import torch
from torch import Tensor

from ssl_exit.exits.kmeans import kmeans, match_clusters
from ssl_exit.exits.rules import ExitRule, FitData, squared_distances


class KMeansRule(ExitRule):
    """As many centroids as final clusters, matched one to one (Hungarian); logit = -squared distance."""

    name = "kmeans"
    centroids: Tensor

    def __init__(self, dim: int, n_clusters: int) -> None:
        super().__init__(dim, n_clusters)
        self.register_buffer("centroids", torch.zeros(n_clusters, dim))

    def fit(self, data: FitData) -> None:
        sample, labels = data.sample, data.labels
        centroids = kmeans(sample.numpy(), self.n_clusters, seed=data.seed)
        own = squared_distances(sample, torch.from_numpy(centroids)).argmin(1)
        final_of = match_clusters(_joint_counts(own, labels, self.n_clusters, self.n_clusters))
        self.centroids[torch.from_numpy(final_of)] = torch.from_numpy(centroids)

    def logits(self, x: Tensor) -> Tensor:
        return -squared_distances(x, self.centroids)

    @property
    def macs(self) -> int:
        return (len(self.centroids) + 1) * self.dim


class PrototypesRule(ExitRule):
    """Many centroids, each with its distribution over the final clusters; logit = log p(cluster | nearest).

    One image a cluster is added to every distribution in proportion to the clusters' sizes, so that a
    centroid with few images is not sure.
    """

    name = "prototypes"
    prototypes_per_cluster = 100
    centroids: Tensor
    unused: Tensor
    log_p: Tensor

    def __init__(self, dim: int, n_clusters: int) -> None:
        super().__init__(dim, n_clusters)
        n = self.prototypes_per_cluster * n_clusters
        self.register_buffer("centroids", torch.zeros(n, dim))
        self.register_buffer("unused", torch.full((n,), torch.inf))  # how much farther than it is a centroid counts
        self.register_buffer("log_p", torch.zeros(n, n_clusters))

    def fit(self, data: FitData) -> None:
        sample, labels = data.sample, data.labels
        n = max(1, min(len(self.centroids), len(sample) // 10))
        centroids = kmeans(sample.numpy(), n, restarts=1, iterations=20, seed=data.seed)
        own = squared_distances(sample, torch.from_numpy(centroids)).argmin(1)
        counts = _joint_counts(own, labels, n, self.n_clusters)
        prior = np.bincount(labels, minlength=self.n_clusters) + 1.0
        smoothed = counts + prior / prior.sum()
        self.centroids[:n] = torch.from_numpy(centroids)
        self.unused[:n] = 0
        self.log_p[:n] = torch.from_numpy(np.log(smoothed / smoothed.sum(1, keepdims=True)))

    def logits(self, x: Tensor) -> Tensor:
        nearest = (squared_distances(x, self.centroids) + self.unused).argmin(1)
        return self.log_p[nearest] + 0 * x.sum(1, keepdim=True)  # NaN in, NaN out

    @property
    def macs(self) -> int:
        return (len(self.centroids) + 1) * self.dim


def _joint_counts(own: Tensor, final: Tensor, n_own: int, n_final: int) -> np.ndarray:
    """Images in cluster i of the layer and j of the end, (n_own, n_final)."""
    return torch.bincount(own * n_final + final, minlength=n_own * n_final).reshape(n_own, n_final).numpy()
