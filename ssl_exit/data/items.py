"""What datasets and iterables hold: items with an image somewhere in them."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from PIL import Image
from torch.utils.data import DataLoader, IterableDataset

from ssl_exit.data.image_files import KEYS
from ssl_exit.data.memory import MEMORY_SHARE, memory
from ssl_exit.errors import InputError


def image_in(item: Any, key: str | None = None) -> Any:
    """The image in what a dataset holds: the first of a tuple, also of views, or an entry of a mapping.

    Raises:
        InputError: a mapping without one.
    """
    if isinstance(item, (tuple, list)) and len(item):
        return image_in(item[0], key)
    if isinstance(item, Mapping):
        names = KEYS if key is None else (key,)
        own = next((name for name in names if name in item), None)
        if own is None:
            raise InputError(
                f"an image of a dataset must be under one of {names}, or the image_key; got {sorted(map(str, item))}"
            )
        return image_in(item[own], key)
    return item


def unsized(data: Any) -> bool:
    """Whether data give images one after another and do not say how many."""
    if isinstance(data, DataLoader):
        return isinstance(data.dataset, IterableDataset)
    return isinstance(data, Iterable) and not hasattr(data, "__len__")


def each_image(data: Any, key: str | None = None) -> Iterator[Any]:
    """What an iterable gives, one image at a time; batches of a DataLoader are taken apart."""
    if not isinstance(data, DataLoader) or data.batch_size is None:
        yield from data
        return
    for batch in data:
        yield from image_in(batch, key)


def in_memory(items: Iterable[Any], key: str | None) -> list[Any]:
    """What an iterable without positions gives, once.

    Raises:
        InputError: it takes more than a quarter of the memory.
    """
    room, result = MEMORY_SHARE * memory(), []
    for item in items:
        result.append(item)
        image = image_in(item, key)
        room -= 3 * image.width * image.height if isinstance(image, Image.Image) else getattr(image, "nbytes", 0)
        if room < 0:
            raise InputError(
                f"an iterable of more than {len(result)} images does not fit into a quarter of the memory; fit to a "
                "part of it, or to a Dataset with positions; stream() takes it whole"
            )
    return result
