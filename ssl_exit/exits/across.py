"""What exits know of each other: patience and ensembling, for any rule."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ssl_exit.errors import InputError
from ssl_exit.exits.rules import ExitRule


@dataclass(frozen=True)
class AcrossExits:
    """Carries what earlier exits said of an image to later ones.

    Attributes:
        patience: an image may leave where this many consecutive exits, this one included, agree on its label
            (Zhou et al., BERT Loses Patience, arXiv 2006.04152, with the number of layers counted from 1); before
            that its score is NaN, which passes no threshold. With 1, exits decide alone; with every threshold 0,
            patience decides alone.
        ensemble: label and score come from the geometric mean of the probabilities of all exits so far,
            log p = mean_i log p_i, renormalised (Wolczyk et al., Zero Time Waste, arXiv 2106.05409, section 3.2,
            with equal weights).
    """

    patience: int = 1
    ensemble: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.patience, (int, np.integer)) or self.patience < 1:
            raise InputError(f"patience must be a whole number >= 1 (1 = off); got {self.patience!r}")

    def width(self, n_clusters: int) -> int:
        """Numbers carried for an image: its last label and for how long, and summed log-probabilities."""
        return (2 if self.patience > 1 else 0) + (n_clusters if self.ensemble else 0)

    def begin(self, n: int, n_clusters: int, device: torch.device) -> Tensor:
        """What is carried before the first exit, (n, width)."""
        carried = torch.zeros(n, self.width(n_clusters), device=device)
        if self.patience > 1:
            carried[:, 0] = -1  # no label yet
        return carried

    def decide(self, rule: ExitRule, logits: Tensor, carried: Tensor, exit_: int) -> tuple[Tensor, Tensor, Tensor]:
        """Label and score of one exit, (N,) each, and what to carry on, (N, width).

        Args:
            rule: of this exit.
            logits: of this exit, (N, rule.width).
            carried: from the exit before.
            exit_: index of this exit.
        """
        if carried.shape[1] == 0:
            return *rule.decide(logits), carried
        carried = carried.clone()
        log_p = rule.log_probabilities(logits)
        if self.ensemble:
            total = carried[:, -log_p.shape[1] :]
            total += log_p.clamp(min=-100)  # one exit's certain zero is not a veto
            log_p = torch.log_softmax(total / (exit_ + 1), dim=1)
        labels, scores = log_p.argmax(1), rule.score(log_p, logits)
        if self.patience > 1:
            same = carried[:, 0] == labels
            carried[:, 1] = torch.where(same, carried[:, 1] + 1, 1)
            carried[:, 0] = labels
            scores = torch.where(carried[:, 1] >= self.patience, scores, torch.nan)
        return labels, scores, carried
