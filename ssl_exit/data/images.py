"""One kind of image source for a folder, a tensor, a Dataset or a DataLoader; for fitting, clustering and training."""

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

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
from ssl_exit.errors import InputError, printable
from ssl_exit.settings import Runtime

EXTENSIONS = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # of Pillow; its others start programs, or are rare


@dataclass(frozen=True)
class Batch:
    """A batch of images and their positions in the data.

    Attributes:
        indices: position of each image in the data, (N,) int64.
        images: (N, C, H, W); float32 as the encoder takes them, or pixels (see `open_images`).
        skipped: position and reason of each image that could not be used; they are not in `images`.
    """

    indices: Tensor
    images: Tensor
    skipped: dict[int, str] = field(default_factory=dict)


def mirrored(batches: Iterable[Batch]) -> Iterator[Batch]:
    """The same images, left and right exchanged."""
    for batch in batches:
        yield replace(batch, images=batch.images.flip(-1))


class ImageSource:
    """Images by position: every kind of data becomes one of these.

    Attributes:
        paths: file of every image, relative to the folder; None where images are no files.
        targets: class of every image, (N,) int64, or None; for reports only.
    """

    paths: list[str] | None = None
    targets: np.ndarray | None = None

    def __len__(self) -> int:
        raise NotImplementedError

    def batches(self, order: np.ndarray, batch_size: int) -> Iterator[Batch]:
        """Batches of the images at positions `order`, (n,) int, in that order; the last may be smaller."""
        raise NotImplementedError

    def name(self, position: int) -> str:
        """How a message refers to an image."""
        return printable(self.paths[position]) if self.paths else f"position {position}"


ImageData = Tensor | Dataset | DataLoader | ImageSource | str | Path


def open_images(
    data: Any,
    preprocessing: Preprocessing | None = None,
    num_workers: int = 0,
    *,
    max_pixels: int = Runtime.max_pixels,
    pixels: bool = False,
) -> ImageSource:
    """Make an image source.

    Args:
        data: a folder of images (searched recursively, sorted by path); a tensor, (N, C, H, W); a map-style
            Dataset of images or of tuples whose first entry is the image; a DataLoader over one, of which
            the dataset, collate_fn and workers are used and the images come in dataset order; or a source.
            Floating-point images are taken as they are; uint8 and PIL images are preprocessed.
        preprocessing: for folders, uint8 and PIL images.
        num_workers: processes that decode images.
        max_pixels: of one image of a folder; larger ones are skipped.
        pixels: neither scale to [0, 1] nor standardise: uint8 images keep their pixels, resized and cropped.

    Raises:
        InputError: data of another kind, empty, or in need of a preprocessing that is missing.
    """
    if isinstance(data, (str, Path)):
        data = FolderImages(Path(data), preprocessing, max_pixels)
    if isinstance(data, ImageSource):
        source = data
    elif isinstance(data, Tensor):
        source = TensorImages(data, preprocessing, pixels=pixels)
    elif isinstance(data, DataLoader):
        source = _loader_source(data, preprocessing, pixels)
    elif hasattr(data, "__getitem__") and hasattr(data, "__len__") and not isinstance(data, np.ndarray):
        source = DatasetImages(data, preprocessing, num_workers, pixels=pixels)
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

    Links are followed, but no folder is visited twice; what is no regular file is left out.

    Args:
        folder: of images.
        preprocessing: of every image.
        max_pixels: of one image; larger ones are unreadable. Pillow's own limit is 178,956,970
            (`PIL.Image.MAX_IMAGE_PIXELS`, which the command line lifts).

    Attributes:
        paths: the files, relative to the folder.
        classes: names of the sub-folders, if every image lies in one; for evaluation only.

    Raises:
        InputError: no folder, no preprocessing, or no images in it.
    """

    def __init__(self, folder: Path, preprocessing: Preprocessing | None, max_pixels: int = Runtime.max_pixels) -> None:
        if not folder.is_dir():
            raise InputError(f"{str(folder)!r} is not a folder; expected a folder of images")
        if preprocessing is None:
            raise InputError("a folder of images needs a preprocessing (size, mean, std)")
        self.folder, self.max_pixels = folder, max_pixels
        self.paths, unreadable = _image_files(folder)
        if unreadable:
            warnings.warn(
                f"{len(unreadable)} folders cannot be read, such as {unreadable[0]}; images in them are left out",
                stacklevel=2,
            )
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
        return self.read(index, self.preprocessing)

    def read(self, index: int, transform: Callable[[Image.Image], Tensor]) -> Tensor | Unreadable:
        """One image, decoded and transformed, or the reason why it cannot be read."""
        try:
            with Image.open(self.folder / self.paths[index], formats=FORMATS) as image:
                if image.width * image.height > self.max_pixels:
                    return Unreadable(
                        f"{image.width} x {image.height} pixels are more than max_pixels allows: {self.max_pixels}"
                    )
                return transform(image)
        except Exception as error:  # decoders raise whatever a damaged file leads them to
            return Unreadable(f"{type(error).__name__}: {error}")

    def versions(self) -> Iterator[str]:
        """Size in bytes and time of the last change of every file; both empty where it has gone."""
        for path in self.paths:
            try:
                about = os.stat(self.folder / path)
                yield f"{about.st_size} {about.st_mtime_ns}"
            except OSError:
                yield ""


def _image_files(folder: Path) -> tuple[list[str], list[str]]:
    """Image files below a folder, sorted paths relative to it, and why folders in it cannot be read.

    Links to folders are followed after all real folders, so that what is reached both ways has its real name.
    """
    paths, unreadable = [], []
    visited: set[tuple[int, int]] = set()
    waiting, links = [""], list[str]()
    while waiting or links:
        where = waiting.pop() if waiting else links.pop(0)
        try:
            about = os.stat(folder / where)
            if (about.st_dev, about.st_ino) in visited:
                continue
            visited.add((about.st_dev, about.st_ino))
            entries = sorted(os.scandir(folder / where), key=lambda entry: entry.name)
        except OSError as error:
            unreadable.append(f"{str(folder / where)!r} ({error.strerror})")
            continue
        for entry in entries:
            path = os.path.join(where, entry.name)
            try:
                if entry.is_dir():
                    (links if entry.is_symlink() else waiting).append(path)
                elif os.path.splitext(entry.name)[1].lower() in EXTENSIONS and entry.is_file():
                    paths.append(path)
            except OSError:  # a link that leads in a circle
                continue
    return sorted(paths), unreadable


class TensorImages(ImageSource):
    """A tensor of images, (N, C, H, W).

    Raises:
        InputError: another shape or type, or uint8 without a preprocessing.
    """

    def __init__(
        self,
        images: Tensor,
        preprocessing: Preprocessing | None = None,
        targets: np.ndarray | None = None,
        *,
        pixels: bool = False,
    ) -> None:
        if images.dim() != 4:
            raise InputError(f"a tensor of images has four dimensions, (N, C, H, W); got {tuple(images.shape)}")
        self.images, self.targets = images, targets
        self.convert = _Converter(preprocessing, pixels)
        self.convert.check(images.dtype)

    def __len__(self) -> int:
        return len(self.images)

    def batches(self, order: np.ndarray, batch_size: int) -> Iterator[Batch]:
        for start in range(0, len(order), batch_size):
            indices = torch.from_numpy(order[start : start + batch_size])
            yield Batch(indices, self.convert(self.images[indices]))


class DatasetImages(ImageSource):
    """A map-style dataset, read by a DataLoader."""

    def __init__(
        self,
        dataset: Any,
        preprocessing: Preprocessing | None,
        num_workers: int,
        collate: Any = None,
        workers: Mapping[str, Any] | None = None,
        *,
        pixels: bool = False,
    ) -> None:
        self.dataset, self.num_workers, self.collate = dataset, num_workers, collate
        self.convert = _Converter(preprocessing, pixels)
        self.workers = workers or {}  # how they are started
        if isinstance(dataset, FolderImages):
            self.paths, self.targets = dataset.paths, dataset.targets

    def __len__(self) -> int:
        return len(self.dataset)

    def batches(self, order: np.ndarray, batch_size: int) -> Iterator[Batch]:
        loader = DataLoader(
            _Indexed(self.dataset, self.convert, untouched=self.collate is not None),
            batch_size=batch_size,
            sampler=map(int, order),  # a list of a million takes 36 MB
            num_workers=self.num_workers,
            collate_fn=_Collate(self.collate, self.convert),
            generator=torch.Generator().set_state(torch.get_rng_state()),  # the global one is not advanced
            **self.workers,
        )
        try:
            yield from loader
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise OSError(
                f"a process that decodes images died ({error}): memory, or shared memory in /dev/shm, may be full; use "
                "fewer num_workers or a smaller batch_size, or 0 workers to see the reason"
            ) from error


@dataclass(frozen=True)
class _Converter:
    """From what a dataset holds to what a batch holds."""

    preprocessing: Preprocessing | None
    pixels: bool

    def check(self, dtype: torch.dtype) -> None:
        if dtype == torch.uint8 and self.preprocessing is None:
            raise InputError("uint8 and PIL images need a preprocessing (size, mean, std); or use float tensors")
        if dtype != torch.uint8 and not dtype.is_floating_point:
            raise InputError(f"images must be floating point or uint8; got {dtype}")

    def __call__(self, images: Tensor | Image.Image) -> Tensor:
        self.check(images.dtype if isinstance(images, Tensor) else torch.uint8)
        if isinstance(images, Tensor) and images.dtype != torch.uint8:
            return images if self.pixels else images.float()
        assert self.preprocessing is not None
        return self.preprocessing.pixels(images) if self.pixels else self.preprocessing(images)


class _Indexed(Dataset):
    """Items of a dataset with their position; images come out as tensors, or as the reason why not."""

    def __init__(self, dataset: Any, convert: _Converter, untouched: bool) -> None:
        self.dataset, self.convert, self.untouched = dataset, convert, untouched

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[int, Any]:
        if isinstance(self.dataset, FolderImages):
            how = self.dataset.preprocessing
            return index, self.dataset.read(index, how.pixels if self.convert.pixels else how)
        item = self.dataset[index]
        if self.untouched:
            return index, item
        image = item[0] if isinstance(item, (tuple, list)) else item
        return index, self.convert(image) if isinstance(image, Image.Image) else image


class _Collate:
    def __init__(self, collate: Any, convert: _Converter) -> None:
        self.collate, self.convert = collate, convert

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
        return Batch(indices, self.convert(images), skipped)

    @staticmethod
    def _stack(images: list[Any]) -> Any:
        if not all(isinstance(image, Tensor) for image in images):
            raise InputError(
                f"a dataset must return tensors or PIL images, or tuples that begin with one; got {images[0]!r:.80}"
            )
        shapes = {tuple(image.shape) for image in images}
        if len(shapes) > 1:
            raise InputError(f"images of one batch differ in shape: {sorted(shapes)}; resize them in the dataset")
        return default_collate(images)


def _loader_source(loader: DataLoader, preprocessing: Preprocessing | None, pixels: bool) -> DatasetImages:
    if isinstance(loader.dataset, IterableDataset):
        raise InputError("a loader over an IterableDataset has no positions; use a map-style Dataset")
    single = loader.batch_sampler is None  # batch_size=None
    plain = single or type(loader.batch_sampler) is BatchSampler
    sampler = getattr(loader.batch_sampler, "sampler", loader.sampler) if plain else loader.batch_sampler
    n = len(loader.dataset)  # type: ignore[arg-type]
    some = isinstance(sampler, RandomSampler) and (sampler.replacement or sampler.num_samples != n)
    if some or not isinstance(sampler, (SequentialSampler, RandomSampler)):
        raise InputError(
            f"a loader with a {type(sampler).__name__} that chooses its own images has no place for the others; use "
            "torch.utils.data.Subset of the dataset instead"
        )
    collate = None if single else loader.collate_fn
    workers = {"worker_init_fn": loader.worker_init_fn, "multiprocessing_context": loader.multiprocessing_context}
    return DatasetImages(loader.dataset, preprocessing, loader.num_workers, collate, workers, pixels=pixels)
