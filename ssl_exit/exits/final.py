"""What the full encoder answers: the nearest final centroid or, in the supervised mode, its own class."""

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_exit.errors import InputError, shown
from ssl_exit.exits.kmeans import kmeans
from ssl_exit.exits.rules import squared_distances

TEMPERATURE = 0.1  # of soft assignments by cosine


class Final(nn.Module, ABC):
    """Final features, (N, F), to labels; what exits must agree with."""

    @property
    @abstractmethod
    def n_clusters(self) -> int:
        """Number of labels, K."""

    @property
    @abstractmethod
    def macs(self) -> int:
        """Multiply-adds per image."""

    @abstractmethod
    def soft(self, features: Tensor, among: Tensor | None = None) -> Tensor:
        """Soft assignment, rows of sum 1: (N, F) -> (N, K); trained heads and fronts learn from it.

        Args:
            features: of the images.
            among: features, (M, F), that set the scale of distances; None: those of the images.
        """

    @abstractmethod
    def forward(self, features: Tensor) -> Tensor:
        """Labels, (N,) int64; -1 where a feature is not finite."""


class FinalClasses(Final):
    """The supervised mode: the encoder's output is one logit a class, and its label the largest."""

    def __init__(self, n_classes: int) -> None:
        super().__init__()
        self.n_classes = n_classes

    @classmethod
    def of(cls, features: Tensor, n_classes: int) -> "FinalClasses":
        """After a check of the encoder's output, (N, F).

        Raises:
            InputError: F is not the number of classes.
        """
        if features.shape[1] != n_classes:
            raise InputError(
                f"in the supervised mode the encoder gives one logit a class; it gives {features.shape[1]} numbers and "
                f"n_clusters is {n_classes}: keep its classifier, or change n_clusters"
            )
        return cls(n_classes)

    @property
    def n_clusters(self) -> int:
        return self.n_classes

    @property
    def macs(self) -> int:
        return 0

    def soft(self, features: Tensor, among: Tensor | None = None) -> Tensor:
        return torch.softmax(features, dim=1)

    def forward(self, features: Tensor) -> Tensor:
        return torch.where(features.isfinite().all(1), features.argmax(1), -1)


class FinalClusters(Final):
    """Nearest final centroid: the answer the full encoder gives.

    Attributes:
        centroids: (K, D); of unit length if `spherical`.
        spherical: compare directions: features are divided by their L2 norm first.
    """

    centroids: Tensor

    def __init__(self, centroids: Tensor, spherical: bool) -> None:
        super().__init__()
        self.register_buffer("centroids", centroids)
        self.spherical = spherical

    @classmethod
    def fit(
        cls, features: Tensor, n_clusters: int, *, spherical: bool, seed: int, weights: np.ndarray | None = None
    ) -> "FinalClusters":
        """Cluster final features, (N, D), which must be finite, with weights, (N,), if any (see `kmeans`)."""
        points = F.normalize(features, dim=1) if spherical else features
        centroids = kmeans(points.numpy(), n_clusters, spherical=spherical, seed=seed, weights=weights)
        return cls(torch.from_numpy(centroids), spherical)

    @classmethod
    def given(cls, centroids: Tensor, features: Tensor, *, spherical: bool) -> "FinalClusters":
        """Centroids, (K, F), of the user's; of unit length if `spherical`.

        Raises:
            InputError: final features, (N, F), have another length.
        """
        if centroids.shape[1] != features.shape[1]:
            raise InputError(
                f"centroids of {centroids.shape[1]} features do not fit the encoder, which gives {features.shape[1]}"
            )
        return cls(F.normalize(centroids, dim=1) if spherical else centroids, spherical)

    @property
    def n_clusters(self) -> int:
        return len(self.centroids)

    @property
    def macs(self) -> int:
        return self.centroids.numel()

    def soft(self, features: Tensor, among: Tensor | None = None) -> Tensor:
        """softmax(cosine to the centroids / 0.1); if not spherical, of -squared distance / its mean to the nearest."""
        if self.spherical:
            return torch.softmax(F.normalize(features, dim=1) @ self.centroids.T / TEMPERATURE, dim=1)
        scale = squared_distances(features if among is None else among, self.centroids).min(1).values.mean()
        return torch.softmax(-squared_distances(features, self.centroids) / scale.clamp(min=1e-12), dim=1)

    def squared_distances(self, features: Tensor) -> Tensor:
        """From final features, (N, D), to the centroids, (N, K); of directions if `spherical`."""
        return squared_distances(F.normalize(features, dim=1) if self.spherical else features, self.centroids)

    def forward(self, features: Tensor) -> Tensor:
        """Labels, (N,) int64, of final features, (N, D); -1 where a feature is not finite."""
        near = features @ self.centroids.T
        if not self.spherical:  # where lengths of features and centroids count
            near -= self.centroids.square().sum(1) / 2
        return torch.where(features.isfinite().all(1), near.argmax(1), -1)


def centroids_in(clusters: Any) -> tuple[np.ndarray, bool | None]:
    """The centroids, (K, F) float32, in an array, a tensor or a fitted k-means of scikit-learn or FAISS, and whether
    that compares by direction; None where it does not say.

    Raises:
        InputError: there are none, or not all of them are finite.
    """
    spherical = None
    if hasattr(clusters, "cluster_centers_"):
        clusters, spherical = clusters.cluster_centers_, False
    elif hasattr(clusters, "centroids"):
        clusters, spherical = clusters.centroids, bool(getattr(getattr(clusters, "cp", None), "spherical", False))
    try:
        centroids = np.asarray(clusters.detach().cpu() if isinstance(clusters, Tensor) else clusters, dtype=np.float32)
    except (TypeError, ValueError):
        centroids = np.empty(0, dtype=np.float32)
    if centroids.ndim != 2 or not centroids.size or not np.isfinite(centroids).all():
        raise InputError(
            'n_clusters is a number, "auto", final centroids, (K, F), with finite entries, a fitted k-means of '
            f"scikit-learn or FAISS, or a head from features to logits; got {shown(clusters)}"
        )
    return centroids, spherical
