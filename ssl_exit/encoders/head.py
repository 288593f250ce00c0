"""A head of the user's on top of an encoder: what both say together is what exits must agree with."""

import copy
from collections.abc import Callable
from typing import Any

import joblib
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

    @property
    def identity(self) -> str:
        """What a certificate knows of it beside the weights of a module: a hash of a classifier's fitted state, or the
        name of any other callable."""
        if isinstance(self.function, nn.Module):
            return "module"
        if is_classifier(self.function):
            return joblib.hash(self.function)
        named = self.function if hasattr(self.function, "__qualname__") else type(self.function)
        return f"{named.__module__}.{named.__qualname__}"

    def forward(self, features: Tensor) -> Tensor:
        """Features, (N, F), to logits, (N, K); NaN where a feature is not finite.

        Raises:
            InputError: features of another shape, an answer that is neither, or a callable that fails.
        """
        if features.dim() != 2:
            raise InputError(
                f"a head takes features, (N, F); the encoder gives {tuple(features.shape)}: add its pooling to it"
            )
        finite = features.isfinite().all(1)
        if isinstance(self.function, nn.Module):
            answer = self._logits(self.function(features), len(features))
            return torch.where(finite[:, None], answer, float("nan"))
        rows = features[finite].detach().cpu().float()
        answer = self._logits(self._called(rows), len(rows)).to(features)
        logits = features.new_full((len(features), answer.shape[1]), float("nan"))
        logits[finite] = answer
        return logits

    def _called(self, features: Tensor) -> Any:
        try:
            if not is_classifier(self.function):
                return self.function(features)
            function: Any = self.function
            found = (
                function.predict_proba(features.numpy()) if len(features) else torch.empty(0, len(function.classes_))
            )
        except Exception as error:  # of any type: it is the user's code
            reason = f"{type(error).__name__}: {error}".partition("\n")[0]
            raise InputError(f"the head fails on features of shape {tuple(features.shape)} ({reason})") from error
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
        """Copies share a callable that is neither module nor classifier: it may be a session or a client."""
        own = isinstance(self.function, nn.Module) or is_classifier(self.function)
        return Head(copy.deepcopy(self.function, memo) if own else self.function, self.n_labels)


def is_classifier(function: Any) -> bool:
    """Whether it is a classifier of scikit-learn, fitted or not."""
    return not isinstance(function, nn.Module) and hasattr(function, "predict_proba")


def head_of(encoder: Any) -> Head | None:
    """The head that stands on an encoder, if there is one."""
    parts = encoder.modules() if isinstance(encoder, nn.Module) else ()
    return next((part for part in parts if isinstance(part, Head)), None)


class Headed(nn.Module):
    """An encoder and a head."""

    def __init__(self, encoder: nn.Module, head: Head) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.encoder(images))


def with_head(encoder: nn.Module, head: Callable[[Any], Any], n_labels: int | None = None) -> nn.Module:
    """An encoder, out of `as_module`, and a copy of a head as one module that is cut as the encoder is."""
    last = copy.deepcopy(Head(head, n_labels))
    if isinstance(encoder, Chain):
        return Chain({name: encoder.get_submodule(name) for name in encoder.order} | {"head": last})
    headed = Headed(encoder, last)
    return OpaqueEncoder(headed) if isinstance(encoder, OpaqueEncoder) else headed
