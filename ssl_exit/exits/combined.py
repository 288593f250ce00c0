"""Two or more rules at one exit, such as centroids beside a trained head."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from ssl_exit.exits.rules import ExitRule, FitData


class CombinedRule(ExitRule):
    """log p = sum_i w_i log p_i, renormalised: a product of experts whose weights held-out images set.

    E2CM (arXiv 2103.01148) proposes class means to boost an existing scheme of trained exits; this is one way to
    do that with any two rules, "centroid+sdn" by name. A part that cannot be calibrated contributes its raw
    softmax. The score is the largest probability.
    """

    weights: Tensor

    def __init__(self, parts: Sequence[ExitRule]) -> None:
        super().__init__(parts[0].dim, parts[0].n_clusters)
        self.parts = nn.ModuleList(parts)
        self.needs_scatter = any(part.needs_scatter for part in parts)
        self.needs_soft = any(part.needs_soft for part in parts)
        self.sample_images = max(part.sample_images for part in parts)
        self.register_buffer("weights", torch.full((len(parts),), 1 / len(parts)))

    @property
    def rules(self) -> list[ExitRule]:
        return list(self.parts)  # type: ignore[arg-type]

    def fit(self, data: FitData) -> None:
        for part in self.rules:
            part.fit(data)

    @classmethod
    def fit_all(cls, rules: Sequence[ExitRule], data: Sequence[FitData], costs: np.ndarray) -> None:
        each_exit = [rule.rules for rule in rules if isinstance(rule, CombinedRule)]
        for parts in zip(*each_exit, strict=True):
            type(parts[0]).fit_all(parts, data, costs)

    def logits(self, x: Tensor) -> Tensor:
        return torch.cat([part.logits(x) for part in self.rules], dim=1)

    @property
    def width(self) -> int:
        return sum(part.width for part in self.rules)

    @property
    def macs(self) -> int:
        return sum(part.macs for part in self.rules)

    def log_probabilities(self, logits: Tensor) -> Tensor:
        return torch.log_softmax(torch.einsum("pnk,p->nk", self._of_parts(logits), self.weights), dim=1)

    def fit_temperature(self, logits: Tensor, labels: Tensor) -> None:
        """Temperatures of the parts, then the weights that make held-out labels likeliest."""
        for part, z in zip(self.rules, self._split(logits), strict=True):
            part.fit_temperature(z, labels)
        from scipy.optimize import minimize

        log_p = self._of_parts(logits).double()

        def loss(weights: np.ndarray) -> float:
            mixed = torch.einsum("pnk,p->nk", log_p, torch.from_numpy(weights))
            return float(nn.functional.cross_entropy(mixed, labels))

        start = np.full(len(self.parts), 1 / len(self.parts))
        optimum = minimize(loss, start, method="L-BFGS-B", bounds=[(0, 10)] * len(self.parts))
        self.weights.copy_(torch.from_numpy(optimum.x))

    def _split(self, logits: Tensor) -> tuple[Tensor, ...]:
        return logits.split([part.width for part in self.rules], dim=1)

    def _of_parts(self, logits: Tensor) -> Tensor:
        """log p of every part, (parts, N, K), at least -100: no part has a veto."""
        each = zip(self.rules, self._split(logits), strict=True)
        return torch.stack([part.log_probabilities(z).clamp(min=-100) for part, z in each])
