"""EENets: a confidence branch beside the softmax branch, trained with a loss that knows what each exit costs."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ssl_exit.errors import InputError
from ssl_exit.exits.heads import Head

FIRST_STAGE = 0.5


class EENetRule(Head):
    r"""Exits that learn when to be used.

    Demir & Akbas, Early-exit Convolutional Neural Networks (arXiv 2409.05336): the block at exit i has a softmax
    branch, y_i, and a confidence branch, h_i = sigmoid(.); an image leaves when h_i >= threshold (theirs: 1/2).
    With y_E the encoder's own answer, c_i the cost of leaving at exit i and, from the last exit to the first,

        Y_i = h_i y_i + (1 - h_i) Y_{i+1}        C_i = h_i c_i + (1 - h_i) C_{i+1}

    training minimises sum_i [-log Y_i(label) + tradeoff C_i]; the end is a constant, because the encoder is frozen: 1
    where its answer is the target. As in the authors' code, a first stage (half of the training) minimises the
    cross-entropies of all exits alone: a softmax branch that is never used would never learn.

    Their branches are linear in a pooled map that is trained with them; on a frozen encoder both share a hidden layer,
    because no linear function of a descriptor is large wherever one of K clusters is sure.

    Options:
        tradeoff: lambda, what the full encoder's cost is worth in nats. The options of `Head` besides.
    """

    name = "eenet"

    def __init__(
        self, dim: int, n_clusters: int, *, tradeoff: float = 1.0, hidden: int = 128, **options: object
    ) -> None:
        super().__init__(dim, n_clusters, hidden=hidden, **options)  # type: ignore[arg-type]
        if tradeoff < 0:
            raise InputError(f"tradeoff must be >= 0; got {tradeoff}")
        self.tradeoff = tradeoff

    @property
    def width(self) -> int:
        return self.n_clusters + 1

    def log_probabilities(self, logits: Tensor) -> Tensor:
        return super().log_probabilities(logits[:, : self.n_clusters])

    def score(self, log_p: Tensor, logits: Tensor) -> Tensor:
        return logits[:, self.n_clusters].sigmoid()

    def fit_temperature(self, logits: Tensor, labels: Tensor) -> None:
        super().fit_temperature(logits[:, : self.n_clusters], labels)

    def loss(self, outputs: Sequence[Tensor], labels: Tensor, soft: Tensor, costs: Tensor, progress: float) -> Tensor:
        if progress < FIRST_STAGE:
            return super().loss([z[:, : self.n_clusters] for z in outputs], labels, soft, costs, progress)
        answered = soft.argmax(1) == labels  # always, unless classes are learnt
        predicted = torch.where(answered, 1.0, soft.gather(1, labels[:, None])[:, 0])
        answers = [z[:, : self.n_clusters].softmax(1).gather(1, labels[:, None])[:, 0] for z in outputs]
        confidences = [z[:, self.n_clusters].sigmoid() for z in outputs]
        return cost_aware_loss(answers, confidences, predicted, costs, self.tradeoff)


def cost_aware_loss(
    answers: Sequence[Tensor], confidences: Sequence[Tensor], end: Tensor, costs: Tensor, tradeoff: float
) -> Tensor:
    """sum_i mean[-log Y_i + tradeoff C_i], with Y and C as in `EENetRule`.

    Args:
        answers: what each exit gives its target, in [0, 1], (B,) each.
        confidences: h of each exit, in [0, 1], (B,) each.
        end: what the full encoder gives the target, (B,).
        costs: of leaving at each exit and, last, of the full encoder, (E + 1,).
        tradeoff: lambda.
    """
    predicted, cost = end, costs[-1].expand(len(end))
    total = torch.zeros((), device=end.device)
    for y, h, leaving in zip(reversed(answers), reversed(confidences), reversed(costs[:-1]), strict=True):
        predicted = h * y + (1 - h) * predicted
        cost = h * leaving + (1 - h) * cost
        total = total + (tradeoff * cost - predicted.clamp(min=1e-12).log()).mean()
    return total
