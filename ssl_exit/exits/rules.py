"""What an exit rule is: descriptors in, a final cluster and a score out."""

from abc import ABC, abstractmethod
from typing import ClassVar

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor, nn

from ssl_exit.errors import InputError
from ssl_exit.exits.statistics import ClusterStatistics

RULES: dict[str, type["ExitRule"]] = {}


class ExitRule(nn.Module, ABC):
    """Base of all rules at one exit. A subclass computes one logit per final cluster from a descriptor.

    The label is the cluster with the largest logit; the score is its softmax probability at a temperature
    fitted on held-out images (Guo et al., arXiv 1706.04599, section 4.2), so that a score of 0.9 means about
    90 % agreement with the whole encoder.

    A subclass sets `name`, registers its arrays as buffers of fixed shape in `__init__` (so that they can be
    saved and loaded), and writes `fit`, `logits` and `macs`.
    """

    name: ClassVar[str]
    needs_scatter: ClassVar[bool] = False
    temperature: Tensor

    def __init_subclass__(cls) -> None:
        if "name" in cls.__dict__:
            RULES[cls.name] = cls

    def __init__(self, dim: int, n_clusters: int) -> None:
        super().__init__()
        self.dim, self.n_clusters = dim, n_clusters
        self.register_buffer("temperature", torch.ones(()))

    @abstractmethod
    def fit(self, statistics: ClusterStatistics, sample: Tensor, labels: Tensor, seed: int) -> None:
        """Learn from images and their final clusters.

        Args:
            statistics: of all images of the fit.
            sample: descriptors of a random part of them, (m, D).
            labels: final clusters of that part, (m,) int64.
            seed: for rules that draw.
        """

    @abstractmethod
    def logits(self, x: Tensor) -> Tensor:
        """One number per final cluster, larger = closer: (N, D) -> (N, K)."""

    @property
    @abstractmethod
    def macs(self) -> int:
        """Multiply-adds per image."""

    def decide(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Label, (N,) int64, and score, (N,) in [0, 1], of logits, (N, K); NaN stays NaN."""
        best, labels = logits.max(1)
        return labels, ((logits - best[:, None]) / self.temperature).exp().sum(1).reciprocal()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Label and score of descriptors, (N, D)."""
        return self.decide(self.logits(x))

    def fit_temperature(self, logits: Tensor, labels: Tensor) -> None:
        """Set the temperature that makes held-out labels likeliest: logits (n, K), labels (n,)."""
        scaled = logits.double()
        rows = torch.arange(len(labels))

        def loss(log_temperature: float) -> float:
            log_p = torch.log_softmax(scaled / np.exp(log_temperature), dim=1)
            return -float(log_p[rows, labels].mean())

        best = minimize_scalar(loss, bounds=(-7, 7), method="bounded")
        self.temperature.fill_(float(np.exp(best.x)))


def rule_named(name: str) -> type[ExitRule]:
    """The class of a rule.

    Raises:
        InputError: no rule of that name.
    """
    if name not in RULES:
        raise InputError(f"rule {name!r} does not exist; choose one of {sorted(RULES)}")
    return RULES[name]


def squared_distances(x: Tensor, centers: Tensor) -> Tensor:
    """Squared Euclidean distances, (N, D) and (M, D) -> (N, M), by one matrix product."""
    return (x.square().sum(1)[:, None] + centers.square().sum(1) - 2 * x @ centers.T).clamp(min=0)
