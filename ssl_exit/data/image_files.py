"""Image files: found in folders, decoded by an allow-list of formats, unreadable ones told apart."""

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ssl_exit.data.preprocessing import AnyPreprocessing
from ssl_exit.errors import InputError
from ssl_exit.settings import Runtime

EXTENSIONS = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
KEYS = ("image", "pixel_values", "img", "jpg", "jpeg", "png", "webp")  # under which mappings have the image
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # of Pillow; its others start programs, or are rare


class Unreadable(str):
    """The reason why an image cannot be read, in its place."""


class ImageFiles(Dataset):
    """Image files by path.

    Args:
        paths: of the files.
        preprocessing: of every image.
        max_pixels: of one image; larger ones are unreadable.
        folder: that the paths are relative to.

    Raises:
        InputError: no preprocessing.
    """

    targets: np.ndarray | None = None
    classes: Sequence[str] = ()

    def __init__(
        self,
        paths: list[str],
        preprocessing: AnyPreprocessing | None,
        max_pixels: int = Runtime.max_pixels,
        folder: Path = Path(),
    ) -> None:
        if preprocessing is None:
            raise InputError("image files need a preprocessing (size, mean, std)")
        self.folder, self.paths, self.preprocessing, self.max_pixels = folder, paths, preprocessing, max_pixels

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor | Unreadable:
        """The preprocessed image, (C, size, size) float, or the reason why it cannot be read."""
        return self.read(index, self.preprocessing)

    def read(self, index: int, transform: Callable[[Image.Image], Any]) -> Any:
        """One image, decoded and transformed, or the reason why it cannot be read."""
        return self.decoded(self.folder / self.paths[index], transform)

    def decoded(self, file: Any, transform: Callable[[Image.Image], Any]) -> Any:
        """An image file, by path or opened, decoded and transformed, or the reason why it cannot be read."""
        try:
            with Image.open(file, formats=FORMATS) as image:
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


class FolderImages(ImageFiles):
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

    def __init__(
        self, folder: Path, preprocessing: AnyPreprocessing | None, max_pixels: int = Runtime.max_pixels
    ) -> None:
        if not folder.is_dir():
            raise InputError(f"{str(folder)!r} is not a folder; expected a folder of images")
        paths, unreadable = _image_files(folder)
        super().__init__(paths, preprocessing, max_pixels, folder)
        if unreadable:
            warnings.warn(
                f"{len(unreadable)} folders cannot be read, such as {unreadable[0]}; images in them are left out",
                stacklevel=2,
            )
        if not self.paths:
            raise InputError(f"folder {str(folder)!r} holds no image files ({', '.join(EXTENSIONS)})")
        parents = [Path(path).parts[:-1] for path in self.paths]
        self.classes = sorted({p[0] for p in parents}) if all(parents) else []

    @property
    def targets(self) -> np.ndarray | None:  # type: ignore[override]
        """Index of each image's sub-folder, (N,) int64, or None where there are none."""
        if len(self.classes) < 2:
            return None
        index = {name: i for i, name in enumerate(self.classes)}
        return np.array([index[Path(path).parts[0]] for path in self.paths])


class SomeImages(ImageFiles):
    """Some of other images.

    Args:
        images: all of them.
        positions: of those wanted.
    """

    def __init__(self, images: ImageFiles, positions: Sequence[int]) -> None:
        super().__init__([images.paths[i] for i in positions], images.preprocessing, images.max_pixels)
        self.images, self.positions, self.classes = images, positions, images.classes
        self.targets = None if images.targets is None else images.targets[list(positions)]

    def read(self, index: int, transform: Callable[[Image.Image], Any]) -> Any:
        return self.images.read(self.positions[index], transform)


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
