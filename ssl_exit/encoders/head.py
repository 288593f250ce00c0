"""A head of the user's on top of an encoder: what both say together is what exits must agree with."""

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_exit.encoders.chain import Chain
from ssl_exit.encoders.opaque import OpaqueEncoder
from ssl_exit.errors import InputError, shown

SURE = 20.0  # logit of a label that comes without any


class Head(nn.Module):
    """From final features to logits; never traced into.

    Attributes:
        function: a module or any callable from features, (N, F), to logits, (N, K), or to labels, (N,) int, if their
            number is known; or a fitted classifier of scikit-learn.
        n_labels: K, or None where logits say it.
    """

    def __init__(self, function: Callable[[Any], Any], n_labels: int | None = None) -> None:
        super().__init__()
        self.function, self.n_labels = function, n_labels

    def forward(self, features: Tensor) -> Tensor:
        """Features, (N, F), to logits, (N, K); NaN where a feature is not finite.

        Raises:
            InputError: features of another shape, or an answer that is neither.
        """
        if features.dim() != 2:
            raise InputError(
                f"a head takes features, (N, F); the encoder gives {tuple(features.shape)}: add its pooling to it"
            )
        if isinstance(self.function, nn.Module):
            return self._logits(self.function(features), len(features))
        finite = features.isfinite().all(1)
        rows = features[finite].detach().cpu().float()
        answer = self._logits(self._called(rows), len(rows)).to(features)
        logits = features.new_full((len(features), answer.shape[1]), float("nan"))
        logits[finite] = answer
        return logits

    def _called(self, features: Tensor) -> Any:
        probabilities = getattr(self.function, "predict_proba", None)
        if probabilities is None:
            return self.function(features)
        width = len(self.function.classes_)  # type: ignore[attr-defined]
        found = probabilities(features.numpy()) if len(features) else torch.empty(0, width)
        return torch.as_tensor(found).clamp(min=1e-12).log()

    def _logits(self, answer: Any, n: int) -> Tensor:
        result = (
            torch.as_tensor(answer) if isinstance(answer, Tensor) or hasattr(answer, "__array__") else torch.empty(0)
        )
        if result.shape == (n,) and not result.is_floating_point() and self.n_labels:
            if n and not 0 <= int(result.min()) <= int(result.max()) < self.n_labels:
                raise InputError(
                    f"a head gave labels from {int(result.min())} to {int(result.max())}; expected 0 to "
                    f"{self.n_labels - 1}, as many as n_clusters"
                )
            return F.one_hot(result.long(), self.n_labels) * SURE
        if result.dim() != 2 or len(result) != n or not result.is_floating_point():
            raise InputError(
                f"a head gives logits, (N, K), of {n} images, or labels, (N,) int, with their number in n_clusters and "
                f"the head in Clusters(head=...); got {shown(answer)}"
            )
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> "Head":
        """Copies share a callable that is no module: it may be a session or a client."""
        own = isinstance(self.function, nn.Module)
        return Head(copy.deepcopy(self.function, memo) if own else self.function, self.n_labels)


class Headed(nn.Module):
    """An encoder and a head."""

    def __init__(self, encoder: nn.Module, head: Head) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.encoder(images))


def with_head(encoder: nn.Module, head: Callable[[Any], Any], n_labels: int | None = None) -> nn.Module:
    """An encoder, out of `as_module`, and a head as one module that is cut as the encoder is."""
    last = Head(head, n_labels)
    if isinstance(encoder, Chain):
        return Chain({name: encoder.get_submodule(name) for name in encoder.order} | {"head": last})
    headed = Headed(encoder, last)
    return OpaqueEncoder(headed) if isinstance(encoder, OpaqueEncoder) else headed
