"""One kind of image source for a folder, a tensor, a Dataset or a DataLoader."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    default_collate,
)

from ssl_exit.data.preprocessing import Preprocessing
from ssl_exit.errors import InputError

ImageData = Tensor | Dataset | DataLoader | str | Path
EXTENSIONS = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class Batch:
    """A batch of images and where they stand in the data.

    Attributes:
        indices: position of each image in the data, (N,) int64.
        images: float32, (N, C, H, W).
        skipped: position and reason of each image that could not be used; they are not in `images`.
    """

    indices: Tensor
    images: Tensor
    skipped: dict[int, str] = field(default_factory=dict)


def mirrored(batches: Iterable[Batch]) -> Iterator[Batch]:
    """The same images, left and right exchanged."""
    for batch in batches:
        yield replace(batch, images=batch.images.flip(-1))


class ImageSource(Protocol):
    """Images by position: every kind of data becomes one of these."""

    paths: list[str] | None

    def __len__(self) -> int: ...

    def batches(self, order: np.ndarray, batch_size: int) -> Iterator[Batch]:
        """Batches of the images at positions `order`, in that order; the last may be smaller."""
        ...


def open_images(data: ImageData, preprocessing: Preprocessing | None = None, num_workers: int = 0) -> ImageSource:
    """Make an image source.

    Args:
        data: a folder of images (searched recursively, sorted by path); a tensor, (N, C, H, W); a map-style
            Dataset of images or of tuples whose first entry is the image; or a DataLoader over one, of which
            the dataset, collate_fn and workers are used and the images come in dataset order.
            Floating-point images are taken as they are; uint8 and PIL images are preprocessed.
        preprocessing: for folders, uint8 and PIL images.
        num_workers: processes that decode images.

    Raises:
        InputError: data of another kind, empty, or in need of a preprocessing that is not given.
    """
    if isinstance(data, (str, Path)):
        source: ImageSource = _DatasetSource(FolderImages(Path(data), preprocessing), preprocessing, num_workers)
    elif isinstance(data, Tensor):
        source = _TensorSource(data, preprocessing)
    elif isinstance(data, DataLoader):
        source = _loader_source(data, preprocessing)
    elif hasattr(data, "__getitem__") and hasattr(data, "__len__") and not isinstance(data, np.ndarray):
        source = _DatasetSource(data, preprocessing, num_workers)
    else:
        raise InputError(
            f"images must be a folder, an (N, C, H, W) tensor, a map-style Dataset or a DataLoader over one; got "
            f"{type(data).__name__}" + (": use torch.from_numpy" if isinstance(data, np.ndarray) else "")
        )
    if len(source) == 0:
        raise InputError("there are no images: the data are empty")
    return source


class Unreadable(str):
    """The reason why an image cannot be read, in its place."""


class FolderImages(Dataset):
    """The image files below a folder, sorted by path.

    Attributes:
        paths: the files, relative to the folder.
        classes: names of the sub-folders, if every image lies in one; for evaluation only.
    """

    def __init__(self, folder: Path, preprocessing: Preprocessing | None) -> None:
        if not folder.is_dir():
            raise InputError(f"{str(folder)!r} is not a folder; give a folder of images")
        if preprocessing is None:
            raise InputError("a folder of images needs a preprocessing (size, mean, std)")
        found = (os.path.join(at, name) for at, _, names in os.walk(folder, followlinks=True) for name in names)
        self.folder = folder
        self.paths = sorted(os.path.relpath(p, folder) for p in found if Path(p).suffix.lower() in EXTENSIONS)
        if not self.paths:
            raise InputError(f"folder {str(folder)!r} holds no image files ({', '.join(EXTENSIONS)})")
        parents = [Path(path).parts[:-1] for path in self.paths]
        self.classes = sorted({p[0] for p in parents}) if all(parents) else []
        self.preprocessing = preprocessing

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def targets(self) -> np.ndarray | None:
        """Index of each image's sub-folder, (N,) int64, or None where there are none."""
        if len(self.classes) < 2:
            return None
        index = {name: i for i, name in enumerate(self.classes)}
        return np.array([index[Path(path).parts[0]] for path in self.paths])

    def __getitem__(self, index: int) -> Tensor | Unreadable:
        """The preprocessed image, (C, size, size) float, or the reason why it cannot be read."""
        return self._read(index, self.preprocessing)

    def pixels(self, index: int) -> Tensor | Unreadable:
        """The same, neither scaled nor standardised: (C, size, size) uint8, or the reason why it cannot be read."""
        return self._read(index, self.preprocessing.pixels)

    def _read(self, index: int, how: Callable[[Image.Image], Tensor]) -> Tensor | Unreadable:
        try:
            with Image.open(self.folder / self.paths[index]) as image:
                return how(image)
        except Exception as error:  # decoders raise whatever a damaged file leads them to
            return Unreadable(f"{type(error).__name__}: {error}")


class _TensorSource:
    paths: list[str] | None = None

    def __init__(self, images: Tensor, preprocessing: Preprocessing | None) -> None:
        if images.dim() != 4:
            raise InputError(f"a tensor of images has four dimensions, (N, C, H, W); got {tuple(images.shape)}")
        _check_dtype(images.dtype, preprocessing)
        self.images, self.preprocessing = images, preprocessing

    def __len__(self) -> int:
        return len(self.images)

    def batches(self, order: np.ndarray, batch_size: int) -> Iterator[Batch]:
        for at in range(0, len(order), batch_size):
            indices = torch.from_numpy(order[at : at + batch_size])
            yield Batch(indices, _as_float(self.images[indices], self.preprocessing))


class _DatasetSource:
    def __init__(
        self,
        dataset: Any,
        preprocessing: Preprocessing | None,
        num_workers: int,
        collate: Any = None,
        workers: Mapping[str, Any] | None = None,
    ) -> None:
        self.dataset, self.preprocessing, self.num_workers, self.collate = dataset, preprocessing, num_workers, collate
        self.workers = workers or {}  # how they are started
        self.paths = dataset.paths if isinstance(dataset, FolderImages) else None

    def __len__(self) -> int:
        return len(self.dataset)

    def batches(self, order: np.ndarray, batch_size: int) -> Iterator[Batch]:
        loader = DataLoader(
            _Indexed(self.dataset, self.preprocessing, raw=self.collate is not None),
            batch_size=batch_size,
            sampler=map(int, order),  # a list of a million takes 36 MB
            num_workers=self.num_workers,
            collate_fn=_Collate(self.collate, self.preprocessing),
            generator=torch.Generator().set_state(torch.get_rng_state()),  # as the global one, which stays as it is
            **self.workers,
        )
        yield from loader


class _Indexed(Dataset):
    """Items of a dataset with their position; images come out as tensors, or as the reason why not."""

    def __init__(self, dataset: Any, preprocessing: Preprocessing | None, raw: bool) -> None:
        self.dataset, self.preprocessing, self.raw = dataset, preprocessing, raw

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[int, Any]:
        item = self.dataset[index]
        if self.raw:
            return index, item
        image = item[0] if isinstance(item, (tuple, list)) else item
        if isinstance(image, Image.Image):
            _check_dtype(torch.uint8, self.preprocessing)
            image = self.preprocessing(image)  # type: ignore[misc]
        return index, image


class _Collate:
    def __init__(self, collate: Any, preprocessing: Preprocessing | None) -> None:
        self.collate, self.preprocessing = collate, preprocessing

    def __call__(self, items: list[tuple[int, Any]]) -> Batch:
        skipped: dict[int, str] = {index: image for index, image in items if isinstance(image, Unreadable)}
        good = [(index, image) for index, image in items if not isinstance(image, Unreadable)]
        indices = torch.tensor([index for index, _ in good], dtype=torch.int64)
        if not good:
            return Batch(indices, torch.empty(0), skipped)
        images = (self.collate or self._stack)([image for _, image in good])
        images = images[0] if isinstance(images, (tuple, list)) else images
        if not isinstance(images, Tensor) or images.dim() != 4 or len(images) != len(good):
            got = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
            raise InputError(f"a batch of {len(good)} images must be a tensor, (N, C, H, W); the dataset gave {got}")
        return Batch(indices, _as_float(images, self.preprocessing), skipped)

    @staticmethod
    def _stack(images: list[Any]) -> Any:
        if not all(isinstance(image, Tensor) for image in images):
            raise InputError(
                f"a dataset must give tensors or PIL images, or tuples that begin with one; got {images[0]!r:.80}"
            )
        shapes = {tuple(image.shape) for image in images}
        if len(shapes) > 1:
            raise InputError(f"images of one batch differ in shape: {sorted(shapes)}; resize them in the dataset")
        return default_collate(images)


def _loader_source(loader: DataLoader, preprocessing: Preprocessing | None) -> _DatasetSource:
    if isinstance(loader.dataset, IterableDataset):
        raise InputError("a loader over an IterableDataset has no positions; give a map-style Dataset")
    single = loader.batch_sampler is None  # batch_size=None
    plain = single or type(loader.batch_sampler) is BatchSampler
    sampler = getattr(loader.batch_sampler, "sampler", loader.sampler) if plain else loader.batch_sampler
    n = len(loader.dataset)  # type: ignore[arg-type]
    some = isinstance(sampler, RandomSampler) and (sampler.replacement or sampler.num_samples != n)
    if some or not isinstance(sampler, (SequentialSampler, RandomSampler)):
        raise InputError(
            f"a loader with a {type(sampler).__name__} that chooses its own images has no place for the others; give "
            "torch.utils.data.Subset of the dataset instead"
        )
    collate = None if single else loader.collate_fn
    workers = {"worker_init_fn": loader.worker_init_fn, "multiprocessing_context": loader.multiprocessing_context}
    return _DatasetSource(loader.dataset, preprocessing, loader.num_workers, collate, workers)


def _check_dtype(dtype: torch.dtype, preprocessing: Preprocessing | None) -> None:
    if dtype == torch.uint8 and preprocessing is None:
        raise InputError("uint8 and PIL images need a preprocessing (size, mean, std); or give float tensors")
    if dtype != torch.uint8 and not dtype.is_floating_point:
        raise InputError(f"images must be floating point or uint8; got {dtype}")


def _as_float(images: Tensor, preprocessing: Preprocessing | None) -> Tensor:
    _check_dtype(images.dtype, preprocessing)
    return preprocessing(images) if preprocessing and images.dtype == torch.uint8 else images.float()
