"""Tar shards as Ray Data reads them: from any filesystem that pyarrow opens, member by member."""

import os
import tarfile
from collections.abc import Iterator
from typing import Any

import pyarrow
from ray.data.datasource import FileBasedDatasource

from ssl_exit.data.image_files import EXTENSIONS

BLOCK = 1 << 26  # bytes of images that are passed on at a time


class TarShards(FileBasedDatasource):
    """Rows of path (shard and member) and bytes, one for every image in uncompressed tar files.

    A sparse member is a row without bytes; a damaged shard is an error, after the images before the damage.
    """

    def _read_stream(self, f: Any, path: str) -> Iterator[pyarrow.Table]:
        paths: list[str] = []
        images: list[bytes] = []
        held = 0  # bytes in `images`

        def block() -> pyarrow.Table:
            types = pyarrow.schema({"path": pyarrow.string(), "bytes": pyarrow.binary()})
            return pyarrow.table({"path": paths, "bytes": images}, schema=types)

        try:
            with tarfile.open(fileobj=f, mode="r|") as tar:
                for member in tar:
                    if not member.isfile() or os.path.splitext(member.name)[1].lower() not in EXTENSIONS:
                        continue
                    content = None if member.issparse() else tar.extractfile(member)
                    paths.append(f"{path}/{member.name}")
                    images.append(content.read() if content else b"")
                    held += len(images[-1])
                    if held >= BLOCK:
                        yield block()
                        paths, images, held = [], [], 0
        except tarfile.TarError as error:
            raise ValueError(f"{path!r} cannot be read ({error}); expected an uncompressed tar file") from error
        yield block()
