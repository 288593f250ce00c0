"""torch.compile, where it can be had."""

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

from ssl_exit.encoders.tapped import TappedEncoder


def _probe(x: torch.Tensor) -> torch.Tensor:
    return x.sin() + 1


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile works here; if not, a warning says why. It needs a C++ compiler (CPU) or Triton (GPU)."""
    try:
        torch.compile(_probe)(torch.zeros(8, device=device))
    except Exception as error:  # whatever is missing, and however torch says so
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        warnings.warn(
            f"torch.compile does not work here ({reason}); going on without it. It needs a C++ compiler such as g++",
            stacklevel=2,
        )
        return False
    return True


@contextmanager
def compiled(encoders: Iterable[TappedEncoder], device: torch.device) -> Iterator[None]:
    """Passes of these encoders are compiled for a while, one program for each shape of input; labels, parameters and
    names stay as they are. Where torch.compile does not work they run as before, with a warning."""
    if not can_compile(device):
        yield
        return
    encoders = list(encoders)
    for encoder in encoders:
        for name in ("forward", "final_features"):
            setattr(encoder, name, torch.compile(getattr(encoder, name), dynamic=False))
    try:
        yield
    finally:
        for encoder in encoders:
            del encoder.forward, encoder.final_features
