"""torch.compile, where it can be had."""

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ssl_exit.encoders.tapped import TappedEncoder


def _probe(x: torch.Tensor) -> torch.Tensor:
    return x.sin() + 1


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile works here; if not, a warning says why. It needs a C++ compiler (CPU) or Triton (GPU)."""
    try:
        torch.compile(_probe)(torch.zeros(8, device=device))
    except Exception as error:  # whatever is missing, and however torch says so
        warn_uncompiled(error)
        return False
    return True


def warn_uncompiled(error: Exception) -> None:
    """Warn that torch.compile is not used."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    warnings.warn(
        f"torch.compile does not work here ({reason}); going on without it. It needs a C++ compiler such as g++",
        stacklevel=3,
    )


def compile_for_inference(module: nn.Module, device: torch.device) -> None:
    """Let calls of a module, though not of its `forward`, run compiled: one program a shape; CUDA graphs on a GPU."""
    module.compile(dynamic=False, mode="reduce-overhead" if device.type == "cuda" else None)


def call_compiled(module: nn.Module, *args: Tensor) -> Any:
    """Call a module that `compile_for_inference` prepared; instances of one class may be many."""
    with torch._dynamo.config.patch(cache_size_limit=4096, accumulated_cache_size_limit=4096):
        return module(*args)


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
