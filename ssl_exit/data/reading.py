"""Reading images for a model: with a progress bar, a check of their shape, and a warning of those left out."""

import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from itertools import islice

import numpy as np
from tqdm.auto import tqdm

from ssl_exit.data.images import Batch, ImageSource
from ssl_exit.errors import InputError


def read(
    source: ImageSource, order: np.ndarray, batch_size: int, shape: tuple[int, ...], what: str, progress: bool
) -> Iterator[Batch]:
    """Batches of the images at given positions, (N, C, H, W) each.

    Args:
        source: images.
        order: positions, (n,) int.
        batch_size: images a batch.
        shape: what every image must have, (C, H, W).
        what: they are read for, beside the bar.
        progress: show a bar, on a terminal and for more than one batch.

    Raises:
        InputError: images of another shape.
    """
    shown = progress and len(order) > batch_size
    with tqdm(total=len(order), desc=what, unit="img", disable=None) if shown else nullcontext() as bar:
        for batch in source.batches(order, batch_size):
            if len(batch.indices) and batch.images.shape[1:] != shape:
                raise InputError(
                    f"this model takes images of shape {shape}, as in fit(); got {tuple(batch.images.shape[1:])}"
                )
            yield batch
            if bar is not None:
                bar.update(len(batch.indices) + len(batch.skipped))


def parts(
    batches: Iterator[Batch], begin: int, end: int, batch_size: int, most: int
) -> Iterator[tuple[Iterator[Batch], int]]:
    """Batches of the images from `begin` to `end`, `most` batches at a time, and how many images each part has.

    Every part must be read to its end before the next; positions in it count from its own first image.
    """
    for first in range(begin, end, most * batch_size):
        yield (_moved(batch, -first) for batch in islice(batches, most)), min(most * batch_size, end - first)


def _moved(batch: Batch, by: int) -> Batch:
    """The same batch at other positions."""
    skipped = {position + by: reason for position, reason in batch.skipped.items()}
    return replace(batch, indices=batch.indices + by, skipped=skipped)


def warn_of_skipped(skipped: dict[int, str], source: ImageSource, listed: str = "") -> None:
    """One warning, to the caller of the caller, that names one of the images that could not be used.

    Args:
        skipped: position and reason of each.
        source: of the images.
        listed: where a user finds all of them.
    """
    if skipped:
        position, reason = next(iter(skipped.items()))
        which = name_of(source, position)
        warnings.warn(
            f"{len(skipped)} of {len(source)} images could not be used, such as {which} ({reason})"
            + (f"; {listed} lists all" if listed else ""),
            stacklevel=3,
        )


def name_of(source: ImageSource, position: int) -> str:
    """How to tell a user which image is meant."""
    return source.paths[position] if source.paths else f"position {position}"
