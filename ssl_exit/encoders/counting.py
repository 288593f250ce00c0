"""Counting multiply-adds by torch's FlopCounterMode."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

OPERATIONS = 2  # a multiply-add is two


class NoFusedAttention(TorchFunctionMode):
    """In any function mode torch leaves out its fused transformer kernels, whose operations are not counted."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def counted(function: Callable[[Tensor], Any], images: Tensor) -> tuple[Any, int]:
    """What a function returns for images, (N, C, H, W), and its multiply-adds per image, as far as torch sees them."""
    with NoFusedAttention(), FlopCounterMode(display=False) as counter:
        result = function(images)
    return result, counter.get_total_flops() // (OPERATIONS * len(images))
