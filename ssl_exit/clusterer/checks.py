"""What `fit` takes beside parameters: an encoder to build, and of every image a class or a weight."""

from typing import Any

import numpy as np
import torch
from torch import nn

from ssl_exit.encoders.build import EncoderSpec
from ssl_exit.encoders.graph import as_module
from ssl_exit.encoders.head import head_of
from ssl_exit.errors import InputError
from ssl_exit.settings import Settings

NEGLIGIBLE = 1e-12  # FAISS divides by sums of weights


def built(encoder: Any) -> tuple[nn.Module, EncoderSpec | None]:
    """The network of an encoder, and its architecture if an `EncoderSpec` names it."""
    if not isinstance(encoder, EncoderSpec):
        return as_module(encoder), None
    with torch.random.fork_rng(devices=[]):
        return encoder.build(), encoder.recipe()


def beside(
    y: Any, sample_weight: Any, n: int, settings: Settings, encoder: Any
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Classes and weights of n images, where there are any: classes are for the supervised mode, and for encoders
    without a head of the user's."""
    learnt = y is not None and settings.clusters.supervised and head_of(encoder) is None
    classes = checked_classes(y, n, settings.k) if learnt else None
    return classes, None if sample_weight is None else checked_weights(sample_weight, n)


def checked_classes(y: Any, n: int, n_classes: int) -> np.ndarray:
    """Classes of n images, (n,) int64, from 0 to n_classes - 1; InputError if they are anything else."""
    classes = np.asarray(y)
    integers = classes.shape == (n,) and np.issubdtype(classes.dtype, np.integer)
    if not integers or classes.min() < 0 or classes.max() >= n_classes:
        raise InputError(
            f"y must hold one class from 0 to {n_classes - 1} for each of the {n} images; got shape {classes.shape} of "
            f"{classes.dtype}"
        )
    return classes.astype(np.int64)


def checked_weights(sample_weight: Any, n: int) -> np.ndarray:
    """Weights of n images / the largest, (n,) float32, where less than 1e-12 counts as 0; InputError if they are
    anything else."""
    try:
        weights = np.asarray(sample_weight, dtype=np.float64)
    except (TypeError, ValueError):
        weights = np.empty(0)
    if weights.shape != (n,) or not np.isfinite(weights).all() or weights.min() < 0 or not weights.any():
        raise InputError(f"sample_weight must hold one finite number >= 0 for each of the {n} images, not all 0")
    weights = weights / weights.max()
    return np.where(weights < NEGLIGIBLE, 0, weights).astype(np.float32)
