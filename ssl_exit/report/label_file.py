"""Labels as CSV, JSON lines or Parquet: one row an image, in input order: path, label, exit, score.

In CSV, a name that a spreadsheet would take for a formula, because it begins with = + - @ or a control character, is
written with ./ before it, which names the same file. Names that are not UTF-8 are written as the bytes they are
(Python's surrogateescape: `open(file, encoding="utf-8", errors="surrogateescape")` reads them); in JSON as Python
escapes them, in Parquet with those bytes as \\x...
"""

import csv
import glob
import hashlib
import importlib.util
import io
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NamedTuple

import numpy as np

from ssl_exit.cascade.result import ExitResult
from ssl_exit.errors import InputError
from ssl_exit.files import atomic_file, check_file, lock, remove_unlocked

PARQUET = ".parquet"
FORMULA = ("=", "+", "-", "@", *map(chr, range(32)), "\x7f")  # beginnings of a cell that may be more than text


class Row(NamedTuple):
    """One image: label -1 and neither exit nor score where it could not be used."""

    path: str
    label: int
    exit: str | None
    score: float | None


HEAD = Row._fields


def write_labels(file: Path, names: Sequence[str], result: ExitResult, exit_names: Sequence[str]) -> None:
    """Write all rows at once, in the format that the file's name ends in; it appears complete or not at all.

    An image that could not be used has label -1 and neither exit nor score.

    Raises:
        InputError: another format.
    """
    head, encode = _format(file)
    with atomic_file(file) as draft:
        draft.write_bytes(head + encode(_rows(names, result, exit_names)))
        if file.suffix == PARQUET:
            _to_parquet(draft, draft)


def print_labels(stream: IO[str], names: Sequence[str], result: ExitResult, exit_names: Sequence[str]) -> None:
    """Write the rows of some images to a stream, as CSV."""
    text = _csv(_rows(names, result, exit_names)).decode(errors="backslashreplace")
    stream.write(text.replace("\r\n", "\n"))


class _Mark(NamedTuple):
    """How much of a draft is written: rows, bytes, and the CRC-32 of those bytes; each time a line of JSON and of that
    its own CRC-32."""

    rows: int
    size: int
    crc: int


class LabelFile:
    """Rows written as they come, to a draft beside the file that replaces it when all are written.

    A run that was killed leaves its draft, and beside it marks: after every `add` the number of rows, of bytes, and
    their checksum. The next run with the same key continues behind the last mark up to which the draft is what was
    written; behind a flipped bit it is not. Key, exits, names and versions of the images are part of the draft's name:
    rows of another model, of other images or of images that changed are not continued.

    Attributes:
        n_rows: rows that are written already.
    """

    def __init__(
        self, file: Path, names: Sequence[str], exit_names: Sequence[str], key: str, versions: Sequence[str] = ()
    ) -> None:
        """Open the draft.

        Args:
            file: that appears in the end, as .csv, .jsonl or .parquet.
            names: of all images.
            exit_names: of the exits, and "end".
            key: what the rows depend on; names, exits and versions are added to it.
            versions: of every image, such as size and time of its file.

        Raises:
            InputError: there is a folder or a device of that name, or it ends in another format.
        """
        check_file(file)
        self._head, self._encode = _format(file)
        self.file, self.names, self.exit_names = file, names, exit_names
        digest = hashlib.sha256()
        for word in chain([key, *exit_names, ""], names, [""], versions):
            digest.update(word.encode(errors="surrogateescape") + b"\0")
        self.draft = file.with_name(f".{file.name}-{digest.hexdigest()[:12]}.part")
        self.marks = self.draft.with_suffix(".marks")
        file.parent.mkdir(parents=True, exist_ok=True)
        self._mark = self._last_true_mark()
        with atomic_file(self.marks) as fresh:
            fresh.write_bytes(_line(self._mark))
        with atomic_file(self.draft) as fresh, fresh.open("wb") as f:
            if self.n_rows:
                _copy(self.draft, f, self._mark.size)
            else:
                f.write(self._head)
        self._handle, self._marks = self.draft.open("ab"), self.marks.open("ab")
        for handle, path in ((self._handle, self.draft), (self._marks, self.marks)):
            lock(handle.fileno(), path)

    @property
    def n_rows(self) -> int:
        return self._mark.rows

    def add(self, result: ExitResult) -> None:
        """Append the rows of the next images."""
        end = self.n_rows + len(result.labels)
        rows = self._encode(_rows(self.names[self.n_rows : end], result, self.exit_names))
        self._mark = _Mark(end, self._mark.size + len(rows), zlib.crc32(rows, self._mark.crc))
        for handle, content in ((self._handle, rows), (self._marks, _line(self._mark))):
            handle.write(content)
            handle.flush()

    def __enter__(self) -> "LabelFile":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        ours = os.fstat(self._handle.fileno()).st_ino
        self._handle.close()
        self._marks.close()
        if not self.draft.is_file() or self.draft.stat().st_ino != ours:
            raise InputError(f"another process writes {str(self.file)!r} too; let one of them finish") from error
        if kind is None and self.n_rows == len(self.names):
            if self.file.suffix == PARQUET:
                with atomic_file(self.file) as whole:
                    _to_parquet(self.draft, whole)
                self.draft.unlink()
            else:
                self.draft.replace(self.file)
            self.marks.unlink(missing_ok=True)
            for left in self.file.parent.glob(f".{glob.escape(self.file.name)}-{'?' * 12}.*"):
                if left.suffix in (".part", ".marks"):  # of runs with other keys that were killed
                    remove_unlocked(left)

    def _last_true_mark(self) -> _Mark:
        """The last mark up to which the draft is what was written."""
        last = _Mark(0, len(self._head), zlib.crc32(self._head))
        if not (self.draft.is_file() and self.marks.is_file()):
            return last
        crc, size = 0, 0
        with self.draft.open("rb") as draft, self.marks.open("rb") as marks:
            for line in marks:
                content, _, own = line.rpartition(b" ")
                if own != _checksum(content):  # a flipped bit, or the last line of a run that was killed
                    break
                mark = _Mark(*json.loads(content))
                block = draft.read(max(0, mark.size - size))
                crc, size = zlib.crc32(block, crc), size + len(block)
                if (crc, size) != (mark.crc, mark.size):
                    break
                last = mark
        return last


def _copy(file: Path, to: IO[bytes], size: int) -> None:
    """The first bytes of a file."""
    with file.open("rb") as f:
        while size and (block := f.read(min(size, 1 << 20))):
            to.write(block)
            size -= len(block)


def _line(mark: _Mark) -> bytes:
    content = json.dumps(mark).encode()
    return content + b" " + _checksum(content)


def _checksum(content: bytes) -> bytes:
    return b"%08x\n" % zlib.crc32(content)


def labels_in(file: Path) -> np.ndarray:
    """The labels in a CSV file, (N,) int64."""
    with file.open(newline="", encoding="utf-8", errors="surrogateescape") as f:
        return np.array([int(row["label"]) for row in csv.DictReader(f)], dtype=np.int64)


def as_parquet(file: Path, parquet: Path) -> None:
    """A CSV file of labels once more as Parquet."""
    with file.open(newline="", encoding="utf-8", errors="surrogateescape") as f, atomic_file(parquet) as draft:
        rows = (
            Row(row["path"], int(row["label"]), row["exit"] or None, float(row["score"]) if row["score"] else None)
            for row in csv.DictReader(f)
        )
        draft.write_bytes(_json_lines(rows))
        _to_parquet(draft, draft)


def _format(file: Path) -> tuple[bytes, Callable[[Iterable[Row]], bytes]]:
    """How a file of this name begins, and how rows are written to it, or to the draft of a Parquet file.

    Raises:
        InputError: it ends in no format.
    """
    if file.suffix == ".csv":
        return ",".join(HEAD).encode() + b"\r\n", _csv
    if file.suffix == PARQUET and importlib.util.find_spec("pyarrow") is None:
        raise InputError(f"{str(file)!r} needs pyarrow: pip install 'ssl-exit[parquet]'; or end it in .csv or .jsonl")
    if file.suffix in (".jsonl", PARQUET):
        return b"", _json_lines
    raise InputError(f"labels are written as .csv, .jsonl or .parquet; got {str(file)!r}")


def _csv(rows: Iterable[Row]) -> bytes:
    text = io.StringIO(newline="")
    cells = ((_safe(row.path), row.label, row.exit or "", _number(row.score)) for row in rows)
    csv.writer(text).writerows(cells)
    return text.getvalue().encode("utf-8", errors="surrogateescape")


def _json_lines(rows: Iterable[Row]) -> bytes:
    return b"".join(json.dumps(row._asdict()).encode() + b"\n" for row in rows)


def _to_parquet(lines: Path, file: Path) -> None:
    """JSON lines as a Parquet file; in names that are not UTF-8 the other bytes are escaped."""
    import pyarrow
    from pyarrow import parquet

    kinds = {"path": pyarrow.string(), "label": pyarrow.int64(), "exit": pyarrow.string(), "score": pyarrow.float32()}
    columns: dict[str, list[Any]] = {name: [] for name in HEAD}
    for line in lines.read_bytes().splitlines():
        for name, value in json.loads(line).items():
            columns[name].append(value)
    columns["path"] = [
        path.encode(errors="surrogateescape").decode(errors="backslashreplace") for path in columns["path"]
    ]
    parquet.write_table(pyarrow.table(columns, schema=pyarrow.schema(kinds)), file)


def _rows(names: Sequence[str], result: ExitResult, exit_names: Sequence[str]) -> Iterator[Row]:
    for name, label, exit_, score in zip(names, result.labels, result.exits, result.scores, strict=True):
        used = label >= 0
        yield Row(name, int(label), exit_names[exit_] if used else None, round(float(score), 6) if used else None)


def _safe(name: str) -> str:
    return f"./{name}" if name.startswith(FORMULA) else name


def _number(score: float | None) -> str:
    return "" if score is None else f"{score:.6f}"
