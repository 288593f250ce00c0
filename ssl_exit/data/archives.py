"""Images in tar shards and in Parquet files, each read by its position."""

import io
import os
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from ssl_exit.data.image_files import EXTENSIONS, KEYS, ImageFiles, Unreadable
from ssl_exit.data.memory import MEMORY_SHARE, memory
from ssl_exit.data.preprocessing import AnyPreprocessing
from ssl_exit.errors import InputError
from ssl_exit.settings import Runtime


class TarImages(ImageFiles):
    """The image files in tar shards, such as WebDataset's, in the order of the shards and of their members.

    Shards are indexed once, by their headers, and every image is read where it lies.

    Args:
        shards: uncompressed tar files.
        preprocessing: of every image.
        max_pixels: of one image; larger ones are unreadable.

    Attributes:
        paths: shard and member, as "shard.tar/name.jpg".

    Raises:
        InputError: no preprocessing, a file that is no tar file or is compressed, or no images in any.
    """

    def __init__(
        self, shards: list[Path], preprocessing: AnyPreprocessing | None, max_pixels: int = Runtime.max_pixels
    ) -> None:
        self.shards = [str(shard) for shard in shards]
        self.members: list[tuple[int, int, int]] = []  # shard, offset, size
        paths = []
        for i, shard in enumerate(shards):
            try:
                with tarfile.open(shard, "r:") as tar:
                    for member in tar:
                        if member.isfile() and os.path.splitext(member.name)[1].lower() in EXTENSIONS:
                            self.members.append((i, member.offset_data, member.size))
                            paths.append(f"{shard.name}/{member.name}")
            except (OSError, tarfile.TarError) as error:
                raise InputError(
                    f"{str(shard)!r} cannot be read by position ({error}); expected an uncompressed tar file"
                ) from error
        if not paths:
            raise InputError(f"{self.shards[0]!r} holds no image files ({', '.join(EXTENSIONS)})")
        super().__init__(paths, preprocessing, max_pixels)

    def read(self, index: int, transform: Callable[[Image.Image], Any]) -> Any:
        shard, offset, size = self.members[index]
        try:
            with open(self.shards[shard], "rb") as file:
                file.seek(offset)
                content = file.read(size)
        except OSError as error:
            return Unreadable(f"{type(error).__name__}: {error}")
        return self.decoded(io.BytesIO(content), transform)

    def versions(self) -> Iterator[str]:
        """Size and time of the last change of every shard, and place of the image in it."""
        about = [os.stat(shard) for shard in self.shards]
        for shard, offset, size in self.members:
            yield f"{about[shard].st_size} {about[shard].st_mtime_ns} {offset} {size}"


class ParquetImages(ImageFiles):
    """The images in a column of Parquet files: encoded bytes, Hugging Face's mapping of bytes and path, or paths
    relative to the folder of the file.

    The column is held in memory, still encoded.

    Args:
        files: Parquet files.
        preprocessing: of every image.
        max_pixels: of one image; larger ones are unreadable.
        key: name of the column; None: "image", "pixel_values", "img", "jpg" or "bytes", or the only one of bytes.

    Attributes:
        paths: file and row, as "file.parquet/17", or the path that a row has.

    Raises:
        InputError: no preprocessing, no such column, or more than a quarter of the memory.
    """

    def __init__(
        self,
        files: list[Path],
        preprocessing: AnyPreprocessing | None,
        max_pixels: int = Runtime.max_pixels,
        key: str | None = None,
    ) -> None:
        if sum(file.stat().st_size for file in files) > MEMORY_SHARE * memory():
            raise InputError(
                f"{len(files)} Parquet files are larger than a quarter of the memory; read them in parts, or by "
                "Hugging Face's datasets, which maps them into memory"
            )
        try:
            import pyarrow
            from pyarrow import parquet
        except ImportError as error:
            raise InputError("Parquet files need pyarrow: pip install 'ssl-exit[parquet]'") from error
        self.cells: list[bytes | str] = []
        paths = []
        for file in files:
            try:
                schema = parquet.read_schema(file)
                name = key or _image_column(schema, file)
                column = parquet.read_table(file, columns=[name])[name]
            except (OSError, KeyError, pyarrow.ArrowException) as error:
                raise InputError(f"{str(file)!r} cannot be read as Parquet: {error}") from error
            for row, value in enumerate(column):
                cell, path = _cell(value.as_py(), file)
                self.cells.append(cell)
                paths.append(path or f"{file.name}/{row}")
        super().__init__(paths, preprocessing, max_pixels)

    def read(self, index: int, transform: Callable[[Image.Image], Any]) -> Any:
        cell = self.cells[index]
        return self.decoded(io.BytesIO(cell) if isinstance(cell, bytes) else cell, transform)

    def versions(self) -> Iterator[str]:
        """Length of every image; of one that is a file, its size."""
        for cell in self.cells:
            yield str(len(cell) if isinstance(cell, bytes) else os.path.getsize(cell) if os.path.exists(cell) else -1)


def _image_column(schema: Any, file: Path) -> str:
    from pyarrow import types

    binary = [f.name for f in schema if types.is_binary(f.type) or types.is_large_binary(f.type)]
    name = next((name for name in (*KEYS, "bytes") if name in schema.names), None)
    if name is None and len(binary) != 1:
        raise InputError(
            f"{str(file)!r} has no column of images that stands out among {schema.names}; name it (image_key)"
        )
    return name or binary[0]


def _cell(value: Any, file: Path) -> tuple[bytes | str, str | None]:
    """Encoded image or path of its file, and the name to show."""
    if isinstance(value, dict):
        name = value.get("path")
        return (value["bytes"], name) if value.get("bytes") else _cell(name, file)
    if isinstance(value, str):
        return str(file.parent / value), value
    return (value if isinstance(value, bytes) else b""), None


def archives(data: Path) -> list[Path]:
    """The tar shards or Parquet files that a path means: the file itself, or those in a folder of nothing but such."""
    suffixes = (".tar", ".parquet")
    if data.suffix in suffixes and data.is_file():
        return [data]
    if not data.is_dir():
        return []
    files = sorted(file for file in data.iterdir() if file.suffix in suffixes and file.is_file())
    return [file for file in files if file.suffix == files[0].suffix]
