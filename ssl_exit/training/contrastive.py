r"""SimCLR and MoCo v2, with the contrastive loss at the exits too where that is asked for.

What is minimised over encoder f and projection heads g and g_e, for two views x', x'' of every image:

    l(g, f) + w * mean_e l(g_e, d_e)

with d_e the descriptor at exit e, w = exit_weight, and l the contrastive loss of the method. With w = 0 exits take no
part. A query z and its key z+ (of unit length) have the loss

    -log exp(z z+ / T) / [exp(z z+ / T) + sum_j exp(z n_j / T)]

SimCLR (Chen et al., arXiv 2002.05709, equation 1): both views pass through f and g, each is the other's key, and n_j
are all other views of the batch. MoCo v2 (He et al., arXiv 1911.05722 and 2003.04297): keys come from a moving average
of f and g, and n_j are the keys of earlier batches, kept in a memory bank.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from lightly.loss import NTXentLoss
from lightly.models.modules import MoCoProjectionHead, SimCLRProjectionHead
from lightly.models.modules.memory_bank import MemoryBankModule
from lightly.models.utils import batch_shuffle, batch_unshuffle, update_momentum
from torch import Tensor, nn

from ssl_exit.encoders.tapped import TappedEncoder
from ssl_exit.errors import InputError
from ssl_exit.training.module import ExitTraining, frozen_copy


class _Contrastive(ExitTraining):
    """What both methods share.

    Args:
        common: see `ExitTraining`.
        exit_weight: w; 0 is the plain method.
        hidden: units of the heads' hidden layer.
        projection: entries of a projection.

    Raises:
        InputError: numbers out of range.
    """

    head: type[nn.Module]

    def __init__(self, *common: Any, exit_weight: float = 0.0, hidden: int = 512, projection: int = 128) -> None:
        super().__init__(*common)
        if exit_weight < 0 or hidden < 1 or projection < 1:
            raise InputError(
                f"exit_weight must be >= 0, hidden and projection >= 1; got {exit_weight}, {hidden} and {projection}"
            )
        self.options = {"exit_weight": exit_weight, "hidden": hidden, "projection": projection}
        self.exit_weight, self.projection = exit_weight, projection
        exits = [d.dim for d in self.tapped.descriptors] if exit_weight else []
        self.ends = list(accumulate(exits, initial=0))
        self.heads = nn.ModuleList(self.head(dim, hidden, projection) for dim in [self.tapped.output.dim, *exits])

    def _projections(self, tapped: TappedEncoder, heads: nn.ModuleList, images: Tensor) -> list[Tensor]:
        """Of the encoder's output first, then of every exit: (N, C, H, W) -> (N, P) float32 each."""
        if len(heads) == 1:
            inputs = [tapped.final_features(images)]
        else:
            described, output = tapped(images)
            inputs = [output, *(described[:, a:b] for a, b in pairwise(self.ends))]
        return [head(x).float() for head, x in zip(heads, inputs, strict=True)]

    def _total(self, each: Sequence[Tensor]) -> dict[str, Tensor]:
        final, *exits = each
        if not exits:
            return {"loss": final}
        at_exits = torch.stack(list(exits)).mean()
        return {"loss": final + self.exit_weight * at_exits, "final": final, "exits": at_exits}


class SimCLR(_Contrastive):
    """SimCLR (see above).

    Args:
        common: see `ExitTraining`.
        temperature: T.
        options: `exit_weight`, `hidden` and `projection`, as above.

    Raises:
        InputError: numbers out of range.
    """

    head = SimCLRProjectionHead

    def __init__(self, *common: Any, temperature: float = 0.5, **options: Any) -> None:
        super().__init__(*common, **options)
        self.options["temperature"] = temperature
        self.criterion = contrastive_loss(temperature)

    def losses(self, target: Tensor, views: Sequence[Tensor]) -> dict[str, Tensor]:
        projections = self._projections(self.tapped, self.heads, torch.cat(list(views)))
        with torch.autocast(self.device.type, enabled=False):
            return self._total([self.criterion(*z.chunk(2)) for z in projections])


class MoCo(_Contrastive):
    """MoCo v2 (see above), symmetric: each view is a query once and a key once, as in lightly's benchmark.

    Keys run through the network in shuffled groups, each with batch statistics of its own, on any number of devices:
    statistics shared by a query and its key would give the key away (MoCo's shuffled batch normalisation).

    Args:
        common: see `ExitTraining`.
        temperature: T.
        key_momentum: m of the moving average, key = m key + (1 - m) query.
        bank: keys in the memory bank, of each head its own.
        groups: of keys in a batch.
        options: `exit_weight`, `hidden` and `projection`, as above.

    Raises:
        InputError: numbers out of range.
    """

    head = MoCoProjectionHead

    def __init__(
        self,
        *common: Any,
        temperature: float = 0.1,
        key_momentum: float = 0.99,
        bank: int = 4096,
        groups: int = 8,
        **options: Any,
    ) -> None:
        super().__init__(*common, **options)
        if not 0 <= key_momentum < 1 or min(bank, groups) < 1:
            raise InputError(
                f"key_momentum must lie in [0, 1), bank and groups be >= 1; got {key_momentum}, {bank} and {groups}"
            )
        self.options |= {"temperature": temperature, "key_momentum": key_momentum, "bank": bank, "groups": groups}
        self.key_momentum, self.groups = key_momentum, groups
        self.key_tapped, self.key_heads = frozen_copy(self.tapped), frozen_copy(self.heads)
        self.criteria = nn.ModuleList(contrastive_loss(temperature, (bank, self.projection)) for _ in self.heads)

    @property
    def stepped(self) -> list[TappedEncoder]:
        return [self.tapped, self.key_tapped]

    def losses(self, target: Tensor, views: Sequence[Tensor]) -> dict[str, Tensor]:
        for query, key in ((self.tapped, self.key_tapped), (self.heads, self.key_heads)):
            update_momentum(query, key, self.key_momentum)
        one, two = views
        queries = self._projections(self.tapped, self.heads, torch.cat([one, two]))
        with torch.no_grad():
            keys = self._keys(torch.cat([two, one]))
        with torch.autocast(self.device.type, enabled=False):
            return self._total([loss(q, k) for loss, q, k in zip(self.criteria, queries, keys, strict=True)])

    def _keys(self, images: Tensor) -> list[Tensor]:
        """Projections by the moving average, group by group in shuffled order: (N, C, H, W) -> (N, P) each."""
        shuffled, order = batch_shuffle(images)
        groups = shuffled.tensor_split(min(self.groups, len(images) // 2))
        projections = [self._projections(self.key_tapped, self.key_heads, group) for group in groups]
        return [batch_unshuffle(torch.cat(each), order) for each in zip(*projections, strict=True)]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Memory banks too: lightly's are not part of its state."""
        checkpoint["banks"] = [[x.cpu() for x in bank.buffers()] for bank in self._banks]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        for bank, saved in zip(self._banks, checkpoint["banks"], strict=True):
            for mine, its in zip(bank.buffers(), saved, strict=True):
                mine.copy_(its)

    @property
    def _banks(self) -> list[nn.Module]:
        return [m for m in self.criteria.modules() if isinstance(m, MemoryBankModule)]


def contrastive_loss(temperature: float, bank: tuple[int, int] | int = 0) -> NTXentLoss:
    """lightly's NT-Xent; negatives are gathered from all processes.

    Raises:
        InputError: temperature not above 0.
    """
    if temperature <= 0:
        raise InputError(f"temperature must be above 0; got {temperature}")
    return NTXentLoss(temperature, memory_bank_size=bank, gather_distributed=torch.distributed.is_available())
