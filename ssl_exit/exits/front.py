"""The rule of a front: the head it was taught with."""

import torch
from torch import Tensor

from ssl_exit.exits.rules import ExitRule, FitData


class FrontRule(ExitRule):
    """logits = W x + b, taught together with the front whose features x are; score = largest probability.

    Targets are sharpened soft assignments of the full encoder (`ssl_exit.training.front`). A temperature is fitted as
    for every rule. It has no name: fronts have it, and no other exit can.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, dim: int, n_clusters: int) -> None:
        super().__init__(dim, n_clusters)
        self.register_buffer("weight", torch.zeros(n_clusters, dim))
        self.register_buffer("bias", torch.zeros(n_clusters))

    def fit(self, data: FitData) -> None:
        """Nothing: it was taught."""

    def logits(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight.T)

    @property
    def macs(self) -> int:
        return self.weight.numel()
