"""Counting multiply-adds by torch's FlopCounterMode."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry, sdpa_flop_count

OPERATIONS = 2  # a multiply-add is two


class NoFusedAttention(TorchFunctionMode):
    """In any function mode torch leaves out its fused transformer kernels, whose operations are not counted."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def flop_counter() -> FlopCounterMode:
    """A counter that knows attention on the CPU too, which torch's own learned late (2.13)."""
    own = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return FlopCounterMode(display=False, custom_mapping={} if own in flop_registry else {own: _attention})


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


@torch.no_grad()
def counted(function: Callable[[Tensor], Any], images: Tensor) -> tuple[Any, int]:
    """What a function returns for images, (N, C, H, W), and its multiply-adds per image, as far as torch sees them."""
    with NoFusedAttention(), flop_counter() as counter:
        result = function(images)
    return result, counter.get_total_flops() // (OPERATIONS * len(images))
