"""BranchyNet: a side branch at every exit, and entropy as the criterion."""

import math

from torch import Tensor

from ssl_exit.exits.heads import Head


class BranchyNetRule(Head):
    r"""A classifier with a hidden layer at every exit; an image leaves where the entropy of its answer is small.

    Teerapittayanon, McDanel & Kung, BranchyNet (arXiv 1709.01686), section III: an image leaves when
    entropy(p) = -sum_k p_k log p_k < T. The score is 1 - entropy(p) / log K, so score >= threshold is the
    same test. Branches are trained together on the sum of their cross-entropies (equation 1, all weights 1); the
    encoder is frozen here, and a branch sees the descriptor, not the map.
    """

    name = "branchynet"

    def __init__(self, dim: int, n_clusters: int, *, hidden: int = 128, **options: object) -> None:
        super().__init__(dim, n_clusters, hidden=hidden, **options)  # type: ignore[arg-type]

    def score(self, log_p: Tensor, logits: Tensor) -> Tensor:
        entropy = -(log_p.exp() * log_p.clamp(min=-100)).sum(1)
        return (1 - entropy / math.log(max(2, self.n_clusters))).clamp(0, 1)
