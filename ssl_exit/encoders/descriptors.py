"""Descriptors: the small vector pooled from the tensor at an exit point.

A tensor at an exit point is a map, (N, C, H, W) or (N, H, W, C); a sequence of tokens, (N, T, C); or a
vector, (N, D), which is its own descriptor.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_exit.errors import InputError, shown

SMALLEST = 1e-10  # variance of which a root is taken: the slope at 0 is infinite
SIDE = 32  # positions a side from which a pyramid is computed, at most

Layout = Literal["map", "map_channels_last", "tokens", "vector"]


def layout_of(shape: tuple[int, ...], image: tuple[int, int]) -> Layout:
    """How to read the tensor at an exit point: `shape` is its own without the batch, `image` is (H, W).

    A map keeps the proportions of the image in its two spatial dimensions; that tells (C, H, W) from
    (H, W, C). Where both fit, it is read as (C, H, W).
    """
    if len(shape) == 3:
        wanted = math.log(image[0] / image[1])
        first, last = (abs(math.log(h / w) - wanted) for h, w in (shape[1:], shape[:2]))
        return "map" if first <= last else "map_channels_last"
    if len(shape) == 2:
        return "tokens"
    if len(shape) == 1:
        return "vector"
    raise InputError(
        f"no descriptor fits a tensor of shape (N, {', '.join(map(str, shape))}); expected a map, (N, C, H, W), "
        "tokens, (N, T, C), or vectors, (N, D): choose another exit point"
    )


def average(x: Tensor) -> Tensor:
    """Global average over positions: (N, C, H, W) -> (N, C), (N, T, C) -> (N, C)."""
    return x.mean(dim=(2, 3) if x.dim() == 4 else 1, dtype=_wide(x))


def pyramid(x: Tensor) -> Tensor:
    """Averages of the four quarters of the map, its standard deviation and maximum: (N, C, H, W) -> (N, 6C).

    The average of the whole is the mean of the quarters' and would add nothing to a linear rule. Quarters of an odd
    side share its middle row or column. In channels_last, pooling kernels take a fraction of the time of reductions
    such as `amax`, `std` and `vector_norm`. The standard deviation comes from E[x^2] - E[x]^2: in float32 it is
    rounding where it is below a thousandth of the mean, in bfloat16 below a twentieth.

    A map of more than 32 positions a side is averaged to at most 32 first, in one pass where there would be five.
    """
    x = x.contiguous(memory_format=torch.channels_last)
    if max(x.shape[2:]) > SIDE:
        x = F.avg_pool2d(x, [-(-side // SIDE) for side in x.shape[2:]], ceil_mode=True)
    h, w = x.shape[2:]
    if h % 2 == w % 2 == 0:
        quarters = F.avg_pool2d(x, (h // 2, w // 2))
        mean = F.avg_pool2d(quarters, 2).flatten(1)
    else:
        quarters, mean = F.adaptive_avg_pool2d(x, 2), F.avg_pool2d(x, (h, w)).flatten(1)
    std = _deviation(F.avg_pool2d(x.square(), (h, w)).flatten(1), mean)
    return torch.cat([quarters.flatten(1), std, F.max_pool2d(x, (h, w)).flatten(1)], dim=1)


def tokens(x: Tensor) -> Tensor:
    """First token, average and standard deviation of all tokens: (N, T, C) -> (N, 3C)."""
    mean = _sum(x) / x.shape[1]
    return torch.cat([x[:, 0], mean, _deviation(_sum(x.square()) / x.shape[1], mean)], dim=1)


def _wide(x: Tensor) -> torch.dtype:
    """float32 at least."""
    return torch.promote_types(x.dtype, torch.float32)


def _sum(x: Tensor) -> Tensor:
    """(N, L, D) -> (N, D)."""
    return x.sum(1, dtype=_wide(x))


def _deviation(square: Tensor, mean: Tensor) -> Tensor:
    """Standard deviation from E[x^2] and E[x]; without fused multiply-adds, which make noise of a constant map."""
    return (square - mean.square()).clamp(min=SMALLEST).sqrt()


def flatten(x: Tensor) -> Tensor:
    """Every entry of the tensor: (N, ...) -> (N, D). Wide: for comparisons with methods that do not pool."""
    return x.flatten(1)


@dataclass(frozen=True)
class _Kind:
    pool: Callable[[Tensor], Tensor]
    layouts: tuple[Layout, ...]
    width: int  # entries per channel; 0 for all there are
    reads: int  # multiply-adds per element of the tensor: one for each moment that is formed


KINDS = {
    "average": _Kind(average, ("map", "map_channels_last", "tokens"), width=1, reads=1),
    "pyramid": _Kind(pyramid, ("map", "map_channels_last"), width=6, reads=3),
    "tokens": _Kind(tokens, ("tokens",), width=3, reads=2),
    "flatten": _Kind(flatten, ("map", "map_channels_last", "tokens"), width=0, reads=0),
}


@dataclass(frozen=True)
class Descriptor:
    """Pools the tensor at one exit point into (N, dim) vectors.

    Attributes:
        kind: "average", "pyramid", "tokens" or "flatten"; vectors pass through any kind.
        shape: shape of the tensor at the exit point, without the batch.
        layout: how that tensor is read.
        normalize: divide each descriptor by its L2 norm.
    """

    kind: str
    shape: tuple[int, ...]
    layout: Layout
    normalize: bool = False

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InputError(f"descriptor {shown(self.kind)} does not exist; choose 'auto' or one of {sorted(KINDS)}")
        if self.layout != "vector" and self.layout not in KINDS[self.kind].layouts:
            legal = sorted(name for name, kind in KINDS.items() if self.layout in kind.layouts)
            raise InputError(
                f"descriptor {self.kind!r} does not fit the tensor (N, {', '.join(map(str, self.shape))}), read as "
                f"{self.layout}; choose one of {legal}"
            )

    @property
    def dim(self) -> int:
        channels = self.shape[0] if self.layout in ("map", "vector") else self.shape[-1]
        width = 1 if self.layout == "vector" else KINDS[self.kind].width
        return channels * width if width else math.prod(self.shape)

    @property
    def macs(self) -> int:
        """Multiply-adds per image spent on pooling, at most: pyramids of large maps take fewer."""
        return 0 if self.layout == "vector" else KINDS[self.kind].reads * math.prod(self.shape)

    def __call__(self, x: Tensor) -> Tensor:
        if self.layout == "map_channels_last":
            x = x.permute(0, 3, 1, 2)
        pooled = x if self.layout == "vector" else KINDS[self.kind].pool(x)
        views = self.layout == "vector" or self.kind == "flatten"  # of x, which the next stage may change in place
        pooled = pooled.to(torch.float32, copy=views)
        return F.normalize(pooled, dim=1) if self.normalize else pooled
