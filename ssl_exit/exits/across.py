"""What exits know of each other: patience and ensembling, for any rule."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ssl_exit.exits.rules import ExitRule


@dataclass(frozen=True)
class AcrossExits:
    """Carries what earlier exits said of an image to later ones, as a state of `width` numbers.

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

    @property
    def active(self) -> bool:
        """Whether exits depend on earlier ones."""
        return self.patience > 1 or self.ensemble

    def width(self, n_clusters: int) -> int:
        """Numbers carried for an image: its last label and for how long, and summed log-probabilities."""
        return (2 if self.patience > 1 else 0) + (n_clusters if self.ensemble else 0)

    def begin(self, n: int, n_clusters: int, device: torch.device) -> Tensor:
        """The state before the first exit, (n, width)."""
        state = torch.zeros(n, self.width(n_clusters), device=device)
        if self.patience > 1:
            state[:, 0] = -1  # no label yet
        return state

    def decide(self, rule: ExitRule, logits: Tensor, state: Tensor, exit_: int) -> tuple[Tensor, Tensor, Tensor]:
        """Label and score of one exit, (N,) each, and the state behind it, (N, width).

        Args:
            rule: of this exit.
            logits: of this exit, (N, rule.width).
            state: from the exit before.
            exit_: index of this exit.
        """
        state = state.clone()
        log_p = rule.log_probabilities(logits)
        if self.ensemble:
            total = state[:, -log_p.shape[1] :]
            total += log_p.clamp(min=-100)  # one exit's certain zero is not a veto
            log_p = torch.log_softmax(total / (exit_ + 1), dim=1)
        labels, scores = log_p.argmax(1), rule.score(log_p, logits)
        if self.patience > 1:
            same = state[:, 0] == labels
            state[:, 1] = torch.where(same, state[:, 1] + 1, 1)
            state[:, 0] = labels
            scores = torch.where(state[:, 1] >= self.patience, scores, torch.nan)
        return labels, scores, state

    def decide_all(self, rules: tuple[ExitRule, ...], logits: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Labels and scores of all exits, (N, E) each, from the logits of each, (N, rule.width)."""
        state = self.begin(len(logits[0]), rules[0].n_clusters, logits[0].device) if self.active else None
        said = []
        for i, (rule, z) in enumerate(zip(rules, logits, strict=True)):
            if state is None:
                said.append(rule.decide(z))
            else:
                label, score, state = self.decide(rule, z, state, i)
                said.append((label, score))
        return torch.stack([label for label, _ in said], dim=1), torch.stack([score for _, score in said], dim=1)
