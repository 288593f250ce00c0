"""Values in an encoder's graph that depend on no pixel, only on the height, width and number of images."""

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor


class Constant(NamedTuple):
    """What depends on no pixel: a number, string, tensor, None, `PerImage`, or a tuple or list of all but tensors."""

    value: Any


@dataclass(frozen=True)
class PerImage:
    """A value that follows from the number N of images in a batch.

    Attributes:
        unit: a number, where the value is N times as much; or a row, (1, ...), where it is N such rows.
    """

    unit: int | Tensor


def constant_of(two: Any, three: Any) -> Constant | None:
    """The constant behind what a node gave for two images and for three others; None if it depends on them.

    Types and devices are none, which a model changes.
    """
    if isinstance(two, Tensor) and isinstance(three, Tensor):
        if two.shape == three.shape:
            return Constant(two) if bool((two == three).all()) else None
        rows = two.shape[1:] == three.shape[1:] and (two.shape[:1], three.shape[:1]) == ((2,), (3,))
        same = rows and bool((two == two[:1]).all() and (three == two[:1]).all())
        return Constant(PerImage(two[:1])) if same else None
    if isinstance(two, (tuple, list)) and isinstance(three, (tuple, list)) and len(two) == len(three):
        entries = [constant_of(*pair) for pair in zip(two, three, strict=True)]
        values = [entry.value for entry in entries if entry and tensor_in(entry.value) is None]
        return Constant(list(values) if isinstance(two, list) else tuple(values)) if len(values) == len(two) else None
    if two is None and three is None:
        return Constant(None)
    if isinstance(two, (bool, int, float, str)) and type(two) is type(three):
        if two == three:
            return Constant(two)
        if isinstance(two, int) and isinstance(three, int) and two % 2 == 0 and three * 2 == two * 3:
            return Constant(PerImage(two // 2))
    return None


def tensor_in(value: Any) -> Tensor | None:
    """The tensor that a constant needs, if it needs one."""
    value = value.unit if isinstance(value, PerImage) else value
    return value if isinstance(value, Tensor) else None
