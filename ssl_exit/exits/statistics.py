"""Mergeable statistics of descriptors: everything a centroid rule needs is a sum over images."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ssl_exit.errors import InputError


@dataclass
class ClusterStatistics:
    """Counts, sums and a scatter of descriptors by final cluster; two of them merge by addition.

    The within-cluster covariance follows without a second pass: the scatter minus
    sum_k counts_k mean_k mean_k^T. All is taken about an origin near the mean, because descriptors whose mean
    is a hundred standard deviations would leave no digits of single-precision products.

    Attributes:
        origin: what is subtracted from every descriptor, (D,) float64.
        counts: images of each cluster, (K,) float64.
        sums: sum of their descriptors less the origin, (K, D) float64.
        scatter: sum of (x - origin)(x - origin)^T over all images, (D, D) float64, or None where no rule
            needs it.
    """

    origin: Tensor
    counts: Tensor
    sums: Tensor
    scatter: Tensor | None

    @classmethod
    def empty(cls, n_clusters: int, origin: Tensor, *, scatter: bool = True) -> "ClusterStatistics":
        """Statistics of no images; the origin, (D,), may be zero or any guess at the mean."""
        dim = len(origin)
        counts, sums = torch.zeros(n_clusters).double(), torch.zeros(n_clusters, dim).double()
        return cls(origin.double(), counts, sums, torch.zeros(dim, dim).double() if scatter else None)

    def add(self, x: Tensor, labels: Tensor) -> None:
        """Count images in: descriptors, (N, D), and their final clusters, (N,) int64."""
        x, labels = x.cpu().double() - self.origin, labels.cpu()  # so that shards agree to twelve digits
        self.counts += torch.bincount(labels, minlength=len(self.counts))
        self.sums.index_add_(0, labels, x)
        if self.scatter is not None and len(x):
            from scipy.linalg.blas import dsyrk  # half of a symmetric product: double precision at the cost of single

            lower = torch.from_numpy(dsyrk(1.0, x.numpy().T, lower=1)).tril()
            self.scatter += lower + lower.tril(-1).T

    def __add__(self, other: "ClusterStatistics") -> "ClusterStatistics":
        """The statistics of both sets of images.

        Raises:
            InputError: they differ in clusters, dimensions or in having a scatter.
        """
        if self.sums.shape != other.sums.shape or (self.scatter is None) != (other.scatter is None):
            raise InputError(
                f"statistics of different shapes cannot be merged: {tuple(self.sums.shape)} and "
                f"{tuple(other.sums.shape)} (clusters, dimensions), both with a scatter or both without"
            )
        other = other._about(self.origin)
        scatter = None if self.scatter is None or other.scatter is None else self.scatter + other.scatter
        return ClusterStatistics(self.origin, self.counts + other.counts, self.sums + other.sums, scatter)

    def _about(self, origin: Tensor) -> "ClusterStatistics":
        """The same images about another origin: x - b = (x - a) + (a - b)."""
        shift = self.origin - origin
        scatter = self.scatter
        if scatter is not None:
            cross = torch.outer(self.sums.sum(0), shift)
            scatter = scatter + cross + cross.T + self.counts.sum() * torch.outer(shift, shift)
        return ClusterStatistics(origin, self.counts, self.sums + self.counts[:, None] * shift, scatter)

    def leading(self, dim: int) -> "ClusterStatistics":
        """The same for the first `dim` entries of every descriptor (views, no copies)."""
        scatter = None if self.scatter is None else self.scatter[:dim, :dim]
        return ClusterStatistics(self.origin[:dim], self.counts, self.sums[:, :dim], scatter)

    def at(self, columns: Tensor) -> "ClusterStatistics":
        """The same for some entries of every descriptor: (d,) int64."""
        scatter = None if self.scatter is None else self.scatter[columns][:, columns]
        return ClusterStatistics(self.origin[columns], self.counts, self.sums[:, columns], scatter)

    @property
    def mean(self) -> Tensor:
        """Mean descriptor of all images, (D,) float64."""
        return self.origin + self.sums.sum(0) / self.counts.sum()

    @property
    def means(self) -> Tensor:
        """Mean descriptor of each cluster, (K, D) float64; the mean of all images where a cluster has none."""
        own = self.origin + self.sums / self.counts[:, None].clamp(min=1)
        return torch.where(self.counts[:, None] > 0, own, self.mean)

    @property
    def within_covariance(self) -> Tensor:
        """Covariance about the cluster means, shared by all clusters, (D, D) float64."""
        if self.scatter is None:
            raise InputError("these statistics were collected without a scatter; collect them with scatter=True")
        means = self.sums / self.counts[:, None].clamp(min=1)
        return (self.scatter - self.sums.T @ means) / self.counts.sum()
