"""Small distilled heads: the library's best rule where a few minutes of training are affordable."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_exit.exits.heads import Head


class MLPRule(Head):
    r"""One hidden layer at every exit, taught by the full encoder's soft assignment; score = largest probability.

    Training minimises sum_i cross-entropy(q, softmax(z_i)), with q the soft assignment of the same image to the
    final clusters, softmax(cosine / 0.1) (self-distillation: Hinton et al., arXiv 1503.02531; Zhang et al., Be
    Your Own Teacher, arXiv 1905.08094). Soft targets say which images lie between clusters, and that is what an exit
    must know. In the supervised mode, too, it learns the encoder's answers and not the classes. Beside the hidden
    layer there is a linear part, which `start="centroid"` lets begin as the centroid rule.
    """

    name = "mlp"

    def __init__(self, dim: int, n_clusters: int, *, hidden: int = 128, **options: object) -> None:
        super().__init__(dim, n_clusters, hidden=hidden, **options)  # type: ignore[arg-type]

    def loss(self, outputs: Sequence[Tensor], labels: Tensor, soft: Tensor, costs: Tensor, progress: float) -> Tensor:
        return torch.stack([F.cross_entropy(z, soft) for z in outputs]).sum()
