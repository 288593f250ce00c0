"""Images for training: uint8 pixels of one size, held in memory when they fit, in batches by position."""

import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ssl_exit.data.images import FolderImages
from ssl_exit.data.preprocessing import Preprocessing
from ssl_exit.errors import InputError

MEMORY_SHARE = 0.25  # of the machine's memory that decoded images may take


class Pixels(Dataset):
    """Images by position, before any random change: `pixels[positions]` gives those positions and their pixels.

    Attributes:
        targets: class of each image, (N,) int64, or None; for reports, never for a loss.
    """

    targets: np.ndarray | None

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, positions: Sequence[int] | np.ndarray) -> tuple[Tensor, Tensor]:
        """Positions, (B,) int64, and pixels, (B, C, H, W), uint8 or float in [0, 1]."""
        raise NotImplementedError

    def batches(self, positions: np.ndarray, batch_size: int) -> Iterator[Tensor]:
        """Pixels of the images at these positions, in that order, (B, C, H, W) at a time."""
        for at in range(0, len(positions), batch_size):
            yield self[positions[at : at + batch_size]][1]


class PixelsInMemory(Pixels):
    """A tensor of images, (N, C, H, W), uint8 or float in [0, 1].

    Raises:
        InputError: another shape, kind or range.
    """

    def __init__(self, images: Tensor, targets: np.ndarray | None = None) -> None:
        if images.dim() != 4 or not (images.dtype == torch.uint8 or images.is_floating_point()) or len(images) == 0:
            raise InputError(
                f"training images must be a tensor, (N, C, H, W), uint8 or float; got {tuple(images.shape)} of "
                f"{images.dtype}"
            )
        if images.is_floating_point() and not (images.min() >= 0 and images.max() <= 1):
            raise InputError(
                "floating-point training images must lie in [0, 1]: views are drawn before they are standardised; got "
                f"{images.min().item():.3g} to {images.max().item():.3g}"
            )
        self.images, self.targets = images.cpu(), targets

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, positions: Sequence[int] | np.ndarray) -> tuple[Tensor, Tensor]:
        chosen = torch.as_tensor(positions)
        return chosen, self.images[chosen]


class PixelsOnDisk(Pixels):
    """A folder of images, decoded whenever they are asked for.

    An image that cannot be read is replaced, in its place, by another of the batch or, where there is none, by the
    first of `stand_ins` that can be read; a warning says so once.

    Args:
        folder: the images.
        num_workers: processes that decode in `batches`.

    Attributes:
        stand_ins: positions of the images that may take another's place, (n,) int64; all, unless set.
    """

    def __init__(self, folder: FolderImages, num_workers: int = 0) -> None:
        self.folder, self.targets, self.num_workers = folder, folder.targets, num_workers
        self.warned = False
        self.stand_ins = np.arange(len(folder))

    def __len__(self) -> int:
        return len(self.folder)

    def __getitem__(self, positions: Sequence[int] | np.ndarray) -> tuple[Tensor, Tensor]:
        read = [(int(i), self.folder.pixels(int(i))) for i in positions]
        good = [(i, x) for i, x in read if isinstance(x, Tensor)]
        bad = next((i for i, x in read if isinstance(x, str)), None)
        if not good:
            good = [self._stand_in]
        if bad is not None and not self.warned:
            self.warned = True
            warnings.warn(f"{self.folder.paths[bad]} cannot be read; others stand in for such images", stacklevel=2)
        whole = [(i, x) if isinstance(x, Tensor) else good[0] for i, x in read]
        return torch.tensor([i for i, _ in whole]), torch.stack([x for _, x in whole])

    @property
    def _stand_in(self) -> tuple[int, Tensor]:
        """The first image that can be read."""
        reason = ""
        for i in self.stand_ins.tolist():
            pixels = self.folder.pixels(i)
            if isinstance(pixels, Tensor):
                return i, pixels
            reason = reason or f"{self.folder.paths[i]}: {pixels}"
        raise InputError(
            f"none of the {len(self.stand_ins)} images in {str(self.folder.folder)!r} can be read, {reason}"
        )

    def batches(self, positions: np.ndarray, batch_size: int) -> Iterator[Tensor]:
        order = [positions[at : at + batch_size] for at in range(0, len(positions), batch_size)]
        workers = {"num_workers": self.num_workers, "generator": torch.Generator()}
        for _, pixels in DataLoader(self, batch_size=None, sampler=order, **workers):  # type: ignore[arg-type]
            yield pixels


def open_pixels(
    data: Tensor | str | Path, preprocessing: Preprocessing, num_workers: int = 0, processes: int = 1
) -> Pixels:
    """Training images from a folder or a tensor.

    A folder is decoded once and held in memory if that takes less than a quarter of the machine's memory. Images that
    cannot be read are left out then, with a warning.

    Args:
        data: a folder, searched recursively, or a tensor, (N, C, H, W), uint8 or float in [0, 1].
        preprocessing: size and crop of decoded images.
        num_workers: processes that decode images.
        processes: how many will hold them.

    Raises:
        InputError: no images, or a tensor of another kind.
    """
    if isinstance(data, Tensor):
        return PixelsInMemory(data)
    folder = FolderImages(Path(data), preprocessing)
    needed = processes * len(folder) * len(preprocessing.mean) * preprocessing.size**2
    if needed > MEMORY_SHARE * memory():  # not of what is free: every process must decide alike
        return PixelsOnDisk(folder, num_workers)
    return _decoded(folder, num_workers)


def memory() -> int:
    """Bytes of memory this machine, or the container it is, has."""
    limit = Path("/sys/fs/cgroup/memory.max")
    allowed = limit.read_text().strip() if limit.is_file() else "max"
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return whole if allowed == "max" else min(whole, int(allowed))


def digits_pixels() -> PixelsInMemory:
    """scikit-learn's handwritten digits, (1797, 1, 8, 8) in [0, 1], and their classes."""
    digits = load_digits()
    return PixelsInMemory(torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16, digits.target)


def _decoded(folder: FolderImages, num_workers: int) -> PixelsInMemory:
    loader = DataLoader(
        _Each(folder), batch_size=256, num_workers=num_workers, collate_fn=list, generator=torch.Generator()
    )
    pixels: Tensor | None = None
    kept: list[int] = []
    at = 0
    unread: dict[str, str] = {}
    for batch in loader:
        for x in batch:
            if isinstance(x, str):
                unread[folder.paths[at]] = x
            else:
                if pixels is None:  # at once, so that decoded images are never held twice
                    pixels = torch.empty((len(folder), *x.shape), dtype=torch.uint8)
                pixels[len(kept)] = x
                kept.append(at)
            at += 1
    if pixels is None:
        path, reason = next(iter(unread.items()))
        raise InputError(f"none of the {len(folder)} images in {str(folder.folder)!r} can be read, {path}: {reason}")
    if unread:
        path, reason = next(iter(unread.items()))
        warnings.warn(f"{len(unread)} of {len(folder)} images cannot be read, such as {path} ({reason})", stacklevel=3)
    targets = None if folder.targets is None else folder.targets[kept]
    return PixelsInMemory(pixels[: len(kept)], targets)


class _Each(Dataset):
    def __init__(self, folder: FolderImages) -> None:
        self.folder = folder

    def __len__(self) -> int:
        return len(self.folder)

    def __getitem__(self, index: int) -> Tensor | str:
        return self.folder.pixels(index)


class EpochOrder(Sampler[list[int]]):
    """Positions of every batch of an epoch, in an order drawn from (seed, epoch) alone; the last few are left out.

    Several processes share each batch evenly: rank r of w takes every w-th of its images.

    Args:
        positions: images to draw from, (N,).
        batch_size: images a step, of all processes together.
        seed: of the order.
        rank, world_size: which process this is, of how many.
    """

    def __init__(self, positions: np.ndarray, batch_size: int, seed: int, rank: int = 0, world_size: int = 1) -> None:
        self.positions, self.batch_size, self.seed = positions, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Which epoch comes next."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.positions) // self.batch_size

    def __iter__(self) -> Iterator[list[int]]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.positions)
        for i in range(len(self)):
            yield order[i * self.batch_size : (i + 1) * self.batch_size][self.rank :: self.world_size].tolist()
