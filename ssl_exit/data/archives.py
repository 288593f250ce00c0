"""Images in tar shards and in Parquet files, each read by its position."""

import io
import os
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from ssl_exit.data.image_files import EXTENSIONS, KEYS, ImageFiles, Unreadable
from ssl_exit.data.memory import MEMORY_SHARE, memory
from ssl_exit.data.preprocessing import AnyPreprocessing
from ssl_exit.errors import InputError, shown
from ssl_exit.settings import Runtime

ROWS = 64  # of a Parquet file that are decoded at once, at most
PAGE = 1 << 31  # bytes that a cell may unpack to, however small its file


class TarImages(ImageFiles):
    """The image files in tar shards, such as WebDataset's, in the order of the shards and of their members.

    Shards are indexed once, by their headers, and every image is read where it lies. Sparse members, and one that
    reaches beyond the end of its shard, are unreadable.

    Args:
        shards: uncompressed tar files.
        preprocessing: of every image.
        max_pixels: of one image; larger ones are unreadable.

    Attributes:
        paths: shard and member, as "shard.tar/name.jpg".

    Raises:
        InputError: no preprocessing, a file that is no tar file, is damaged or is compressed, or no images in any.
    """

    def __init__(
        self, shards: list[Path], preprocessing: AnyPreprocessing | None, max_pixels: int = Runtime.max_pixels
    ) -> None:
        self.shards = [str(shard) for shard in shards]
        self.members: list[tuple[int, int, int]] = []  # shard, offset, size; -1: unreadable
        paths = []
        for i, shard in enumerate(shards):
            try:
                with tarfile.open(shard, "r:") as tar:
                    end, last = shard.stat().st_size, -1
                    for member in tar:
                        if member.offset <= last:
                            raise tarfile.ReadError("sizes below zero")
                        last = member.offset
                        if not member.isfile() or os.path.splitext(member.name)[1].lower() not in EXTENSIONS:
                            continue
                        beyond = not member.issparse() and member.offset_data + member.size > end
                        unreadable = beyond or member.issparse()
                        self.members.append((i, member.offset_data, -1 if unreadable else member.size))
                        paths.append(f"{shard.name}/{member.name}")
                        if beyond:  # nothing lies behind it
                            break
            except Exception as error:  # tarfile raises whatever a damaged header leads it to
                raise InputError(
                    f"{str(shard)!r} cannot be read by position ({error}); expected an uncompressed tar file"
                ) from error
        if not paths:
            raise InputError(f"{self.shards[0]!r} holds no image files ({', '.join(EXTENSIONS)})")
        super().__init__(paths, preprocessing, max_pixels)

    def read(self, index: int, transform: Callable[[Image.Image], Any]) -> Any:
        shard, offset, size = self.members[index]
        if size < 0:
            return Unreadable("sparse, or reaches beyond the end of its shard")
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

    The column is held in memory, still encoded. Cells of other types, and paths that lead out of the folder, are
    unreadable images.

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
        room = MEMORY_SHARE * memory()
        too_large = InputError(
            f"{len(files)} Parquet files are larger than a quarter of the memory, or their images are; read them in "
            "parts, or by Hugging Face's datasets, which maps them into memory"
        )
        if sum(file.stat().st_size for file in files) > room:
            raise too_large
        self.cells: list[bytes | str] = []
        paths = []
        for file in files:
            folder = os.path.realpath(file.parent)
            for row, value in enumerate(_column(file, key, max(1, min(ROWS, int(room / PAGE))))):
                cell, path = _cell(value, folder)
                self.cells.append(cell)
                paths.append(path or f"{file.name}/{row}")
                room -= sys.getsizeof(cell) + sys.getsizeof(paths[-1])
                if room < 0:
                    raise too_large
        super().__init__(paths, preprocessing, max_pixels)

    def read(self, index: int, transform: Callable[[Image.Image], Any]) -> Any:
        cell = self.cells[index]
        if isinstance(cell, bytes):
            return self.decoded(io.BytesIO(cell), transform)
        if isinstance(cell, Unreadable):
            return cell
        return self.decoded(cell, transform) if os.path.isfile(cell) else Unreadable(f"no file {shown(cell)}")

    def versions(self) -> Iterator[str]:
        """Length of every image; of one that is a file, its size."""
        for cell in self.cells:
            yield str(len(cell) if isinstance(cell, bytes) else os.path.getsize(cell) if os.path.exists(cell) else -1)


def _column(file: Path, key: str | None, rows: int) -> Iterator[Any]:
    """The cells of the column of images, `rows` decoded at once; nulls where its type can hold none.

    Raises:
        InputError: no pyarrow, a damaged file, or no such column.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise InputError("Parquet files need pyarrow: pip install 'ssl-exit[parquet]'") from error
    try:
        with parquet.ParquetFile(file) as table:
            name = key or _image_column(table.schema_arrow, file)
            if name not in table.schema_arrow.names:
                raise LookupError(f"no column {name!r}")
            for batch in table.iter_batches(rows, columns=_leaves(table.schema, name)):
                for scalar in batch.column(0) if batch.num_columns else pyarrow.nulls(batch.num_rows):
                    yield _value(scalar)
    except InputError:
        raise
    except Exception as error:  # of any type: damaged files lead Arrow to many
        raise InputError(f"{str(file)!r} cannot be read as Parquet: {error}") from error


def _leaves(schema: Any, name: str) -> list[str]:
    """What a column keeps images in: itself, or its fields; no lists, of which one cell may take any memory."""
    paths = [schema.column(i).path for i in range(len(schema))]
    wanted = [path for path in (name, f"{name}.bytes", f"{name}.path") if path in paths]
    return [path for path in wanted if not any(other.startswith(f"{path}.") for other in paths)]


def _value(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except (ValueError, OverflowError) as error:  # text that is not UTF-8, dates out of range
        return Unreadable(f"{type(error).__name__}: {error}")


def _image_column(schema: Any, file: Path) -> str:
    from pyarrow import types

    binary = [f.name for f in schema if types.is_binary(f.type) or types.is_large_binary(f.type)]
    name = next((name for name in (*KEYS, "bytes") if name in schema.names), None)
    if name is None and len(binary) != 1:
        raise InputError(
            f"{str(file)!r} has no column of images that stands out among {schema.names}; name it (image_key)"
        )
    return name or binary[0]


def _cell(value: Any, folder: str) -> tuple[bytes | str, str | None]:
    """Encoded image, path of its file, or why there is neither; and the name to show."""
    if isinstance(value, Unreadable):
        return value, None
    content, path = (None, value) if isinstance(value, str) else (value, None)
    if isinstance(value, dict):
        content, path = value.get("bytes"), value.get("path")
    path = path if isinstance(path, str) else None
    if isinstance(content, bytes) and content:
        return content, path
    if content or not path:
        return Unreadable("the cell holds neither the bytes nor the path of an image"), path
    try:
        file = os.path.realpath(os.path.join(folder, path))
    except ValueError as error:  # no path of any file
        return Unreadable(f"{type(error).__name__}: {error}"), path
    if not Path(file).is_relative_to(folder):
        return Unreadable(f"path outside the folder of the Parquet file: {shown(path)}"), path
    return file, path


def archives(data: Path) -> list[Path]:
    """The tar shards or Parquet files that a path means: the file itself, or those in a folder of nothing but such."""
    suffixes = (".tar", ".parquet")
    if data.suffix in suffixes and data.is_file():
        return [data]
    if not data.is_dir():
        return []
    files = sorted(file for file in data.iterdir() if file.suffix in suffixes and file.is_file())
    return [file for file in files if file.suffix == files[0].suffix]
