"""One kind of image source for a folder, a tensor, a Dataset or a DataLoader; for fitting, clustering and training."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
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

from ssl_exit.data.archives import ParquetImages, TarImages, archives
from ssl_exit.data.image_files import KEYS, FolderImages, ImageFiles, Unreadable
from ssl_exit.data.items import each_image, image_in, in_memory
from ssl_exit.data.preprocessing import AnyPreprocessing
from ssl_exit.errors import InputError, printable, shown
from ssl_exit.settings import Runtime

CHANNELS = (1, 3)


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


ImageData = Tensor | np.ndarray | Dataset | DataLoader | ImageSource | Sequence[Any] | Iterable[Any] | str | Path


def open_images(
    data: Any,
    preprocessing: AnyPreprocessing | None = None,
    num_workers: int = 0,
    *,
    max_pixels: int = Runtime.max_pixels,
    key: str | None = None,
    pixels: bool = False,
) -> ImageSource:
    """Make an image source.

    Args:
        data: a folder of images (searched recursively, sorted by path); a list of paths of image files; a tar shard or
            Parquet file, or a folder of such; a tensor or array, (N, C, H, W), an array also (N, H, W, C); a map-style
            Dataset of images (also Hugging Face's), of tuples whose first entry is one, or of mappings that have one
            under "image", "pixel_values", "img", "jpg" or `key`; a DataLoader over one, of which the dataset,
            collate_fn and workers are used and the images come in dataset order; any other iterable of such items or
            DataLoader of such batches, which is read once into memory; or a source. Floating-point images are taken as
            they are; uint8 images, of a dataset also as arrays, (H, W, C), and PIL images are preprocessed.
        preprocessing: for files, uint8 and PIL images.
        num_workers: processes that decode images.
        max_pixels: of one image file; larger ones are skipped.
        key: under which mappings, or Parquet files, have the image.
        pixels: neither scale to [0, 1] nor standardise: uint8 images keep their pixels, resized and cropped.

    Raises:
        InputError: data of another kind, empty, or in need of a preprocessing that is missing.
    """
    if isinstance(data, (str, Path)):
        data = open_files(Path(data), preprocessing, max_pixels, key)
    elif isinstance(data, (list, tuple)) and data and all(isinstance(path, (str, Path)) for path in data):
        data = ImageFiles([str(path) for path in data], preprocessing, max_pixels)
    elif isinstance(data, np.ndarray) and data.flags.writeable:
        data = _tensor_of(data)  # others, such as files mapped into memory, are read row by row
    if isinstance(data, ImageSource):
        source = data
    elif isinstance(data, Tensor):
        source = TensorImages(data, preprocessing, pixels=pixels)
    elif isinstance(data, DataLoader):
        source = _loader_source(data, preprocessing, pixels, key)
    elif isinstance(data, Mapping):
        raise InputError(f"a mapping of {shown(list(data))} is no set of images; pass one of them, such as a split")
    elif hasattr(data, "__getitem__") and hasattr(data, "__len__"):
        source = DatasetImages(data, preprocessing, num_workers, pixels=pixels, key=key)
    elif isinstance(data, Iterable):
        source = DatasetImages(in_memory(data, key), preprocessing, 0, pixels=pixels, key=key)
    else:
        raise InputError(
            "images must be a folder, a list of paths, tar shards, Parquet files, an (N, C, H, W) tensor or array, a "
            f"Dataset, a DataLoader or another iterable of images; got {type(data).__name__}"
        )
    if len(source) == 0:
        raise InputError("there are no images: the data are empty")
    return source


def open_files(
    data: Path, preprocessing: AnyPreprocessing | None, max_pixels: int = Runtime.max_pixels, key: str | None = None
) -> ImageFiles:
    """The images in a folder of image files, in tar shards or in Parquet files (see `open_images`)."""
    files = archives(data)
    if not files:
        return FolderImages(data, preprocessing, max_pixels)
    if files[0].suffix == ".tar":
        return TarImages(files, preprocessing, max_pixels)
    return ParquetImages(files, preprocessing, max_pixels, key)


def _tensor_of(images: np.ndarray) -> Tensor:
    """An array of images, (N, C, H, W) or, where only that can be, (N, H, W, C), as a tensor, (N, C, H, W).

    Raises:
        InputError: it has no channels, or a type that torch does not have.
    """
    try:
        tensor = torch.from_numpy(images)
    except TypeError as error:
        raise InputError(f"images must be floating point or uint8; got an array of {images.dtype}") from error
    if images.ndim == 4 and images.shape[1] not in CHANNELS and images.shape[3] in CHANNELS:
        return tensor.permute(0, 3, 1, 2)
    if images.ndim == 3:
        raise InputError(f"grey images need a dimension of channels: images[:, None]; got shape {images.shape}")
    return tensor


class TensorImages(ImageSource):
    """A tensor of images, (N, C, H, W).

    Raises:
        InputError: another shape or type, or uint8 without a preprocessing.
    """

    def __init__(
        self,
        images: Tensor,
        preprocessing: AnyPreprocessing | None = None,
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
        preprocessing: AnyPreprocessing | None,
        num_workers: int,
        collate: Any = None,
        workers: Mapping[str, Any] | None = None,
        *,
        pixels: bool = False,
        key: str | None = None,
    ) -> None:
        self.dataset, self.num_workers, self.collate, self.key = dataset, num_workers, collate, key
        self.convert = _Converter(preprocessing, pixels)
        self.workers = workers or {}  # how they are started
        if isinstance(dataset, ImageFiles):
            self.paths, self.targets = dataset.paths, dataset.targets

    def __len__(self) -> int:
        return len(self.dataset)

    def batches(self, order: np.ndarray, batch_size: int) -> Iterator[Batch]:
        loader = DataLoader(
            _Indexed(self.dataset, self.convert, self.key, untouched=self.collate is not None),
            batch_size=batch_size,
            sampler=map(int, order),  # a list of a million takes 36 MB
            num_workers=self.num_workers,
            collate_fn=_Collate(self.collate, self.convert, self.key),
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

    preprocessing: AnyPreprocessing | None
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

    def __init__(self, dataset: Any, convert: _Converter, key: str | None, untouched: bool) -> None:
        self.dataset, self.convert, self.key, self.untouched = dataset, convert, key, untouched

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[int, Any]:
        if isinstance(self.dataset, ImageFiles):
            how = self.dataset.preprocessing
            return index, self.dataset.read(index, how.pixels if self.convert.pixels else how)
        item = self.dataset[index]
        if self.untouched:
            return index, item
        image = image_in(item, self.key)
        if isinstance(image, np.ndarray):
            rows = image[None] if image.ndim == 3 else image[None, None]
            image = _tensor_of(np.require(rows, requirements="W"))[0]
        return index, self.convert(image) if isinstance(image, Image.Image) else image


class _Collate:
    def __init__(self, collate: Any, convert: _Converter, key: str | None) -> None:
        self.collate, self.convert, self.key = collate, convert, key

    def __call__(self, items: list[tuple[int, Any]]) -> Batch:
        skipped: dict[int, str] = {index: image for index, image in items if isinstance(image, Unreadable)}
        good = [(index, image) for index, image in items if not isinstance(image, Unreadable)]
        indices = torch.tensor([index for index, _ in good], dtype=torch.int64)
        if not good:
            return Batch(indices, torch.empty(0), skipped)
        images = (self.collate or self._stack)([image for _, image in good])
        images = image_in(images, self.key)
        if not isinstance(images, Tensor) or images.dim() != 4 or len(images) != len(good):
            got = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
            raise InputError(f"a batch of {len(good)} images must be a tensor, (N, C, H, W); the dataset gave {got}")
        return Batch(indices, self.convert(images), skipped)

    @staticmethod
    def _stack(images: list[Any]) -> Any:
        if not all(isinstance(image, Tensor) for image in images):
            raise InputError(
                "a dataset must return tensors, arrays or PIL images, tuples that begin with one, or mappings that "
                f"hold one under {KEYS}; got {images[0]!r:.80}"
            )
        shapes = {tuple(image.shape) for image in images}
        if len(shapes) > 1:
            raise InputError(f"images of one batch differ in shape: {sorted(shapes)}; resize them in the dataset")
        return default_collate(images)


def _loader_source(
    loader: DataLoader, preprocessing: AnyPreprocessing | None, pixels: bool, key: str | None
) -> DatasetImages:
    if isinstance(loader.dataset, IterableDataset):
        return DatasetImages(in_memory(each_image(loader, key), key), preprocessing, 0, pixels=pixels, key=key)
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
    return DatasetImages(loader.dataset, preprocessing, loader.num_workers, collate, workers, pixels=pixels, key=key)
