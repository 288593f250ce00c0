"""Encoders that cannot be cut: run as one stage behind a front."""

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ssl_exit.encoders.counting import counted
from ssl_exit.errors import InputError

OUTPUTS = ("pooler_output", "image_embeds", "last_hidden_state", "logits")  # of transformers, in order of preference


class OpaqueEncoder(nn.Module):
    """Any callable from a batch of images to features, such as a transformers module, an ONNX Runtime session behind a
    function, or a client of a remote service.

    The result may be a tensor, a NumPy array, a tuple whose first entry is one, or an output object of transformers.

    Attributes:
        function: takes images, (N, C, H, W); a callable that is no module sees them in float32.
    """

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, images: Tensor) -> Tensor:
        x = images if isinstance(self.function, nn.Module) else images.float().contiguous()
        return features_of(self.function(x), images)

    def __deepcopy__(self, memo: dict[int, Any]) -> "OpaqueEncoder":
        """Copies share a callable that is no module: a session or a client cannot be copied."""
        own = isinstance(self.function, nn.Module)
        return OpaqueEncoder(copy.deepcopy(self.function, memo) if own else self.function)


def features_of(result: Any, images: Tensor) -> Tensor:
    """The tensor in what an encoder returned, on the device of the images.

    Raises:
        InputError: there is none, or its first dimension is not the batch.
    """
    read = result.get if isinstance(result, Mapping) else partial(getattr, result)
    value = next((each for name in OUTPUTS if (each := read(name, None)) is not None), result)
    if isinstance(value, Sequence) and len(value):
        value = value[0]
    if not isinstance(value, Tensor) and hasattr(value, "__array__"):
        value = torch.as_tensor(value.__array__())
    if not isinstance(value, Tensor) or value.dim() < 2 or len(value) != len(images):
        got = tuple(value.shape) if isinstance(value, Tensor) else type(result).__name__
        raise InputError(
            f"an encoder must return features of {len(images)} images, (N, ...): a tensor, an array, a tuple that "
            f"begins with one, or an object with one of {', '.join(OUTPUTS)}; got {got}"
        )
    return value.to(images.device)


def multiply_adds(module: nn.Module, example: Tensor) -> int:
    """Multiply-adds per image of whatever torch sees; 0 where all happens elsewhere.

    Raises:
        InputError: the encoder does not take such images.
    """
    try:
        return counted(module, example[:1].expand(2, *example.shape[1:]).clone())[1]
    except InputError:
        raise
    except Exception as error:  # whatever the encoder's own code raises
        raise InputError(
            f"the encoder cannot take images of shape {tuple(example.shape[1:])} and dtype {example.dtype}: {error}. "
            "Use images as the encoder expects them (size, channels, dtype)"
        ) from error
