"""Reading images for a model: with a progress bar, a check of their shape, and a warning of those left out."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from itertools import islice

import numpy as np
from torch import Tensor
from tqdm.auto import tqdm

from ssl_exit.data.images import Batch, ImageSource
from ssl_exit.errors import InputError

LIKE_PIXELS = 20.0  # what no image in [0, 1] reaches once its mean is subtracted and it is divided by its deviation


def read(
    source: ImageSource,
    order: np.ndarray,
    batch_size: int,
    shape: tuple[int, ...] | None = None,
    task: str = "",
    *,
    progress: bool = False,
) -> Iterator[Batch]:
    """Batches of the images at the positions in `order`.

    Args:
        source: images.
        order: positions, (n,) int.
        batch_size: images a batch.
        shape: what every image must have, (C, H, W); None: that of the first.
        task: named beside the progress bar.
        progress: show a bar, on a terminal and for more than one batch.

    Raises:
        InputError: images of another shape, or fewer or more of them than positions.
    """
    came = 0
    shown = progress and len(order) > batch_size
    with tqdm(total=len(order), desc=task, unit="img", disable=None) if shown else nullcontext() as bar:
        for batch in source.batches(order, batch_size):
            came += len(batch.indices) + len(batch.skipped)
            if len(batch.indices):
                if shape is None:
                    _warn_of_unscaled(batch.images)
                shape = shape or tuple(batch.images.shape[1:])
                if batch.images.shape[1:] != shape:
                    raise InputError(
                        f"this model takes images of shape {shape}, as in fit(); got {tuple(batch.images.shape[1:])}"
                    )
            yield batch
            if bar is not None:
                bar.update(len(batch.indices) + len(batch.skipped))
    if came != len(order):
        raise InputError(
            f"{came} images came where the data promised {len(order)}: a Dataset whose len() is wrong, or that raises "
            "StopIteration, or a batch_sampler of your own"
        )


def _warn_of_unscaled(images: Tensor) -> None:
    """Warn of floating-point images that look like pixels from 0 to 255."""
    low, high = (value.item() for value in images.aminmax()) if images.is_floating_point() else (0, 0)
    if low >= 0 and high > LIKE_PIXELS:
        warnings.warn(
            f"images have values from {low:g} to {high:g} and are taken as they are; pixels from 0 to 255 belong in a "
            "uint8 tensor, with a preprocessing",
            stacklevel=3,
        )


def first_images(source: ImageSource, order: np.ndarray, batch_size: int) -> Batch:
    """The first batch with a readable image.

    Raises:
        InputError: there is none.
    """
    reason = "there are none"
    for batch in source.batches(order, batch_size):
        if len(batch.indices):
            return batch
        reason = next(iter(batch.skipped.values()))
    raise InputError(f"none of the {len(order)} images can be read; for example: {reason}")


def parts(
    batches: Iterator[Batch], start: int, stop: int, batch_size: int, most: int
) -> Iterator[tuple[Iterator[Batch], int]]:
    """Batches of the images from `start` to `stop`, `most` batches at a time, and how many images each part has.

    Every part must be read to its end before the next; positions in it count from its own first image.
    """
    for first in range(start, stop, most * batch_size):
        part = (_shifted(batch, -first) for batch in islice(batches, most))
        yield part, min(most * batch_size, stop - first)


def _shifted(batch: Batch, by: int) -> Batch:
    """The same batch at other positions."""
    skipped = {position + by: reason for position, reason in batch.skipped.items()}
    return replace(batch, indices=batch.indices + by, skipped=skipped)


def warn_of_skipped(skipped: Mapping[int, str], source: ImageSource, listed: str = "") -> None:
    """One warning, to the caller of the caller, that names one of the images that could not be used.

    Args:
        skipped: position and reason of each.
        source: of the images.
        listed: where a user reads all of them.
    """
    if skipped:
        position, reason = next(iter(skipped.items()))
        warnings.warn(
            f"{len(skipped)} of {len(source)} images could not be used, such as {source.name(position)} ({reason})"
            + (f"; {listed} lists all" if listed else ""),
            stacklevel=3,
        )
