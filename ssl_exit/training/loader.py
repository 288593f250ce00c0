"""Training images: pixels held in memory where they fit, in full batches by position, in an order drawn per epoch."""

import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssl_exit.data.image_files import ImageFiles
from ssl_exit.data.images import Batch, DatasetImages, ImageSource, TensorImages, open_images
from ssl_exit.data.memory import MEMORY_SHARE, memory
from ssl_exit.data.preprocessing import Preprocessing
from ssl_exit.data.reading import first_images
from ssl_exit.errors import InputError


def open_training_images(
    data: Any, preprocessing: Preprocessing, num_workers: int = 0, processes: int = 1
) -> ImageSource:
    """Pixels to train on, uint8 or float in [0, 1], (C, H, W) each.

    A folder is decoded once and held in memory if that takes less than a quarter of the machine's memory; images that
    cannot be read are left out then, with a warning.

    Args:
        data: whatever `open_images` takes.
        preprocessing: size and crop of decoded images.
        num_workers: processes that decode images.
        processes: how many will hold them.

    Raises:
        InputError: no images, or of another kind, shape or range.
    """
    source = open_images(data, preprocessing, num_workers, pixels=True)
    if isinstance(source, DatasetImages) and isinstance(source.dataset, ImageFiles):
        needed = processes * len(source) * len(preprocessing.mean) * preprocessing.size**2
        if needed <= MEMORY_SHARE * memory():  # not of what is free: every process must decide alike
            source = decoded(source)
    if isinstance(source, TensorImages) and source.images.is_floating_point():
        low, high = source.images.min().item(), source.images.max().item()
        if not 0 <= low <= high <= 1:
            raise InputError(
                "floating-point training images must lie in [0, 1]: views are drawn before they are standardised; got "
                f"{low:.3g} to {high:.3g}"
            )
    return source


def decoded(source: DatasetImages) -> TensorImages:
    """The readable images of a folder, in memory, with a warning of the others."""
    pixels: Tensor | None = None
    kept: list[int] = []
    unreadable: dict[int, str] = {}
    for batch in source.batches(np.arange(len(source)), 256):
        unreadable |= batch.skipped
        if len(batch.indices):
            if pixels is None:  # at once, so that decoded images are never held twice
                pixels = torch.empty((len(source), *batch.images.shape[1:]), dtype=torch.uint8)
            pixels[len(kept) : len(kept) + len(batch.indices)] = batch.images
            kept += batch.indices.tolist()
    if unreadable:
        position, reason = next(iter(unreadable.items()))
        example = f"{source.name(position)}: {reason}"
        if pixels is None:
            raise InputError(f"none of the {len(source)} images can be read, {example}")
        warnings.warn(f"{len(unreadable)} of {len(source)} images cannot be read, such as {example}", stacklevel=4)
    assert pixels is not None
    assert isinstance(source.convert.preprocessing, Preprocessing)
    cropped = replace(source.convert.preprocessing, crop=1.0)  # they are cropped already
    return TensorImages(
        pixels[: len(kept)],
        cropped,
        None if source.targets is None else source.targets[kept],
        pixels=True,
    )


def digits_images() -> TensorImages:
    """scikit-learn's handwritten digits, (1797, 1, 8, 8) in [0, 1], and their classes."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    return TensorImages(pixels, None, digits.target, pixels=True)


class FullBatches:
    """Batches of one size: images that cannot be read are replaced by others of their batch, with one warning; a batch
    without a readable image by the one before, or the first that there is."""

    def __init__(self, source: ImageSource) -> None:
        self.source, self.last, self.warned = source, Batch(torch.empty(0), torch.empty(0)), False

    def __call__(self, order: np.ndarray, batch_size: int) -> Iterator[Batch]:
        """Batches of the images at the positions in `order`, (n,) int."""
        for batch in self.source.batches(order, batch_size):
            if batch.skipped and not self.warned:
                self.warned = True
                position, reason = next(iter(batch.skipped.items()))
                example = f"{self.source.name(position)} ({reason})"
                warnings.warn(f"{example} cannot be read; others replace such images", stacklevel=2)
            wanted = len(batch.indices) + len(batch.skipped)
            if len(batch.indices) == 0 and len(self.last.indices) == 0:
                self.last = first_images(self.source, np.arange(len(self.source)), batch_size)
            usable = self.last = batch if len(batch.indices) else self.last
            if len(usable.indices) != wanted:
                rows = torch.arange(wanted) % len(usable.indices)
                usable = Batch(usable.indices[rows], usable.images[rows])
            yield replace(usable, skipped={})


class EpochLoader:
    """Positions and pixels of every batch of an epoch, in an order drawn from (seed, epoch) alone; the last few images
    are left out.

    Several processes share each batch evenly: rank r of w takes every w-th of its images.

    Args:
        source: images.
        positions: images to draw from, (N,).
        batch_size: images a step, of all processes together.
        seed: of the order.
        rank, world_size: which process this is, of how many.
        pin_memory: for copies to a GPU.

    Attributes:
        epoch: which comes next; the training sets it.
    """

    def __init__(
        self,
        source: ImageSource,
        positions: np.ndarray,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        pin_memory: bool = False,
    ) -> None:
        self.batches, self.positions, self.batch_size, self.seed = FullBatches(source), positions, batch_size, seed
        self.rank, self.world_size, self.pin_memory, self.epoch = rank, world_size, pin_memory, 0

    def __len__(self) -> int:
        return len(self.positions) // self.batch_size

    def order(self) -> np.ndarray:
        """Positions of this process's images in this epoch, batch after batch."""
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.positions)
        steps = order[: len(self) * self.batch_size].reshape(len(self), self.batch_size)
        return steps[:, self.rank :: self.world_size].reshape(-1)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in self.batches(self.order(), self.batch_size // self.world_size):
            yield batch.indices, batch.images.pin_memory() if self.pin_memory else batch.images
