"""Hashes of images, weights and settings: what was used is known by its content."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from ssl_exit.data.images import Batch

REPEATED = "an image of the same content came before"


def module_hash(module: nn.Module) -> str:
    """SHA-256 of the types of its modules, and of its weights."""
    return settings_hash([[type(part).__name__ for part in module.modules()], tensors_hash(module.state_dict())])


_watched: WeakKeyDictionary[nn.Module, tuple[str, str]] = WeakKeyDictionary()  # a cheap look, and the hash then


def watched_hash(module: nn.Module) -> str:
    """`module_hash`, computed again only where a cheap look at the module says that it changed.

    The look takes modules' types and of every tensor its place in memory, version, type, shape, sum and norm, in a
    fraction of the time of a hash.
    """
    seen: list[Any] = [type(part).__name__ for part in module.modules()]
    for name, tensor in module.state_dict(keep_vars=True).items():
        version = 0 if tensor.is_inference() else tensor._version
        values = tensor.detach().float()
        moments = str(values.sum().item()), str(values.norm().item())
        seen.append((name, tensor.data_ptr(), version, str(tensor.dtype), tuple(tensor.shape), *moments))
    look = settings_hash(seen)
    if module not in _watched or _watched[module][0] != look:
        _watched[module] = look, module_hash(module)
    return _watched[module][1]


def tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, types, shapes and values, whatever their order and device."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        plain = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {plain.dtype} {tuple(plain.shape)}".encode())
        if plain.numel():  # an array of none may have strides that cannot be viewed
            digest.update(plain.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def settings_hash(settings: Any) -> str:
    """SHA-256 of settings as JSON."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=lambda v: v.item()).encode()).hexdigest()


def image_hashes(images: Tensor) -> np.ndarray:
    """The first 64 bits of the SHA-256 of every image as the encoder takes it: (N, C, H, W) -> (N,) uint64.

    Two different images of a million have the same with probability 3e-8.
    """
    rows = images.detach().cpu().contiguous().numpy()
    return np.frombuffer(b"".join(hashlib.sha256(row).digest()[:8] for row in rows), dtype=np.uint64)


def images_hash(hashes: np.ndarray) -> str:
    """SHA-256 of a set of images, whatever their order."""
    return hashlib.sha256(np.sort(hashes).tobytes()).hexdigest()


class SeenImages:
    """Which images were used, by their content.

    Attributes:
        hashes: of them, (N,) uint64, sorted.
    """

    def __init__(self, hashes: Sequence[np.ndarray] = ()) -> None:
        self.hashes = np.unique(np.concatenate([np.empty(0, dtype=np.uint64), *hashes]))

    def among(self, hashes: np.ndarray) -> np.ndarray:
        """Which of these images were used: (N,) uint64 -> (N,) bool."""
        if len(self.hashes) == 0:
            return np.zeros(len(hashes), dtype=bool)
        places = np.searchsorted(self.hashes, hashes).clip(max=len(self.hashes) - 1)
        return self.hashes[places] == hashes


def noted(batches: Iterable[Batch], into: list[np.ndarray]) -> Iterator[Batch]:
    """The same batches; the hashes of their images are added to a list."""
    for batch in batches:
        if len(batch.indices):
            into.append(image_hashes(batch.images))
        yield batch


def unseen(batches: Iterable[Batch], used: Mapping[str, SeenImages], into: list[np.ndarray]) -> Iterator[Batch]:
    """Batches without the images that were used before or come a second time; hashes of the others go to a list.

    Args:
        batches: images.
        used: those to leave out, by the reason to report.
        into: the list.
    """
    met: set[int] = set()
    for batch in batches:
        if len(batch.indices):
            hashes = image_hashes(batch.images)
            again: dict[int, str] = {}
            for reason, seen in used.items():
                again |= dict.fromkeys(batch.indices[torch.from_numpy(seen.among(hashes))].tolist(), reason)
            for position, content in zip(batch.indices.tolist(), hashes.tolist(), strict=True):
                if content in met:
                    again.setdefault(position, REPEATED)
                met.add(content)
            fresh = np.array([i not in again for i in batch.indices.tolist()])
            into.append(hashes[fresh])
            if again:
                rows = torch.from_numpy(np.flatnonzero(fresh))
                images = batch.images[rows.to(batch.images.device)]
                batch = Batch(batch.indices[rows], images, batch.skipped | again)
        yield batch
