"""What an exit rule is: descriptors in, a final cluster and a score out."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from ssl_exit.exits.statistics import ClusterStatistics

RULES: dict[str, type["ExitRule"]] = {}


@dataclass(frozen=True)
class FitData:
    """What the rule of one exit is fitted to.

    Attributes:
        statistics: of all images of the fit.
        sample: descriptors of a random part of them, (m, D).
        labels: what to predict for that part, (m,) int64: final clusters, or classes in the supervised mode.
        soft: the full encoder's soft assignment of that part, (m, K), rows of sum 1; (m, 0) if no rule needs it.
        seed: for rules that draw.
    """

    statistics: ClusterStatistics
    sample: Tensor
    labels: Tensor
    soft: Tensor
    seed: int


class ExitRule(nn.Module, ABC):
    """Base of all rules at one exit. A subclass computes one logit per final cluster from a descriptor.

    The label is the cluster with the largest logit; the score is its softmax probability at a temperature
    fitted on held-out images (Guo et al., arXiv 1706.04599, section 4.2), so that a score of 0.9 means about
    90 % agreement with the full encoder.

    A subclass sets `name`, registers its arrays in `__init__` at shapes that depend on nothing but the
    arguments (so that they can be saved and loaded), and writes `fit`, `logits` and `macs`. Further keyword
    arguments of `__init__` are the rule's options, which must be what JSON can hold.

    Attributes:
        needs_scatter: whether `fit` uses the scatter of the statistics.
        needs_soft: whether `fit` uses the soft assignments.
        sample_images: how many images `fit` wants in the sample, as far as memory allows; 0: statistics suffice.
        calibrated: whether held-out images set the temperature; where not, it is 1.
    """

    name: ClassVar[str]
    needs_scatter: bool = False
    needs_soft: bool = False
    sample_images: int = 10_000
    calibrated: ClassVar[bool] = True
    temperature: Tensor

    def __init_subclass__(cls) -> None:
        if "name" in cls.__dict__:
            RULES[cls.name] = cls

    def __init__(self, dim: int, n_clusters: int) -> None:
        super().__init__()
        self.dim, self.n_clusters = dim, n_clusters
        self.register_buffer("temperature", torch.ones(()))

    @abstractmethod
    def fit(self, data: FitData) -> None:
        """Learn from images and their final clusters."""

    @abstractmethod
    def logits(self, x: Tensor) -> Tensor:
        """One number per final cluster, larger = closer: (N, D) -> (N, width)."""

    @property
    @abstractmethod
    def macs(self) -> int:
        """Multiply-adds per image."""

    @property
    def width(self) -> int:
        """Columns of `logits`: the number of clusters, unless a rule carries more to its score."""
        return self.n_clusters

    @classmethod
    def fit_all(cls, rules: Sequence["ExitRule"], data: Sequence[FitData], costs: np.ndarray) -> None:
        """Fit the rules of all exits; one after the other, unless a rule trains them together.

        Args:
            rules: of this class, one for each exit.
            data: one for each exit; all on the same images.
            costs: cost of leaving at each exit and, last, of the full encoder, (E + 1,).
        """
        for rule, one in zip(rules, data, strict=True):
            rule.fit(one)

    def log_probabilities(self, logits: Tensor) -> Tensor:
        """log p(final cluster): (N, width) -> (N, K)."""
        return torch.log_softmax(logits / self.temperature, dim=1)

    def score(self, log_p: Tensor, logits: Tensor) -> Tensor:
        """How sure, (N,) in [0, 1] or NaN; log_p, (N, K), is this exit's own or that of an ensemble."""
        return log_p.max(1).values.exp()

    def decide(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Label, (N,) int64, and score, (N,), of logits, (N, width); NaN stays NaN in the score."""
        log_p = self.log_probabilities(logits)
        return log_p.argmax(1), self.score(log_p, logits)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Label and score of descriptors, (N, D)."""
        return self.decide(self.logits(x))

    def fit_temperature(self, logits: Tensor, labels: Tensor) -> None:
        """Set the temperature that makes held-out labels likeliest: logits (n, width), labels (n,)."""
        if self.calibrated:
            self.temperature.fill_(likeliest_temperature(logits, labels))


def likeliest_temperature(logits: Tensor, labels: Tensor) -> float:
    """argmin over T of the mean of -log softmax(logits / T)[label]; logits (n, K), labels (n,)."""
    from scipy.optimize import minimize_scalar

    def loss(log_temperature: float) -> float:
        return float(temperature_losses(logits, labels, [log_temperature])[0]) / len(labels)

    return float(np.exp(minimize_scalar(loss, bounds=LOG_TEMPERATURES, method="bounded").x))


LOG_TEMPERATURES = (-7, 7)  # the range of log T
WORST = 100.0  # one impossible label must not decide


def temperature_losses(logits: Tensor, labels: Tensor, log_temperatures: Sequence[float] | np.ndarray) -> np.ndarray:
    """Sum of -log softmax(logits / T)[label], each at most `WORST`, at every temperature: (T,) float64."""
    scaled, rows = logits.double(), torch.arange(len(labels))
    each = (torch.log_softmax(scaled / np.exp(log_t), dim=1)[rows, labels] for log_t in log_temperatures)
    return np.array([-float(log_p.clamp(min=-WORST).sum()) for log_p in each])


def squared_distances(x: Tensor, centers: Tensor) -> Tensor:
    """Squared Euclidean distances, (N, D) and (M, D) -> (N, M), by one matrix product."""
    return (x.square().sum(1)[:, None] + centers.square().sum(1) - 2 * x @ centers.T).clamp(min=0)
