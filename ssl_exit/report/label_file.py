"""Labels as CSV: one row an image, in input order: path, label, exit, score."""

import csv
import hashlib
import os
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import IO

from ssl_exit.cascade.result import ExitResult
from ssl_exit.errors import InputError
from ssl_exit.files import atomic_file, check_file

HEAD = ("path", "label", "exit", "score")


def _open(file: Path, mode: str) -> IO[str]:
    return open(file, mode, newline="", encoding="utf-8", errors="surrogateescape")


def write_labels(file: Path, names: Sequence[str], result: ExitResult, exit_names: Sequence[str]) -> None:
    """Write all rows at once; the file appears complete or not at all.

    An image that could not be used has label -1 and neither exit nor score.
    """
    with atomic_file(file) as draft, _open(draft, "w") as f:
        writer = csv.writer(f)
        writer.writerow(HEAD)
        writer.writerows(_rows(names, result, exit_names))


class LabelFile:
    """Rows written as they come, to a draft beside the file that replaces it when all are written.

    A run that was killed leaves its draft; the next one with the same key continues behind its last complete row. Key,
    exits and names of the images are part of the draft's name: rows of another model or of other names are not
    continued.

    Attributes:
        n_rows: rows that are written already.
    """

    def __init__(self, file: Path, names: Sequence[str], exit_names: Sequence[str], key: str) -> None:
        """Open the draft.

        Args:
            file: that appears in the end.
            names: of all images.
            exit_names: of the exits, and "end".
            key: what the rows depend on; names and exits are added to it.

        Raises:
            InputError: there is a folder or a device of that name.
        """
        check_file(file)
        self.file, self.names, self.exit_names = file, names, exit_names
        digest = hashlib.sha256()
        for word in chain([key, *exit_names, ""], names):
            digest.update(word.encode(errors="surrogateescape") + b"\0")
        self.draft = file.with_name(f".{file.name}-{digest.hexdigest()[:12]}.part")
        file.parent.mkdir(parents=True, exist_ok=True)
        self.n_rows = 0
        with atomic_file(self.draft) as fresh, _open(fresh, "w") as f:
            writer = csv.writer(f)
            writer.writerow(HEAD)
            for row in self._complete_rows():
                writer.writerow(row)
                self.n_rows += 1
        self._handle = _open(self.draft, "a")

    def add(self, result: ExitResult) -> None:
        """Append the rows of the next images."""
        end = self.n_rows + len(result.labels)
        csv.writer(self._handle).writerows(_rows(self.names[self.n_rows : end], result, self.exit_names))
        self._handle.flush()
        self.n_rows = end

    def __enter__(self) -> "LabelFile":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        ours = os.fstat(self._handle.fileno()).st_ino
        self._handle.close()
        if not self.draft.is_file() or self.draft.stat().st_ino != ours:
            raise InputError(f"another process writes {str(self.file)!r} too; let one of them finish") from error
        if kind is None and self.n_rows == len(self.names):
            self.draft.replace(self.file)

    def _complete_rows(self) -> Iterator[list[str]]:
        """Rows that an earlier run left: those of these images, up to the last line that has an end."""
        if not self.draft.is_file():
            return
        with self.draft.open("rb") as f:
            f.seek(-min(1, self.draft.stat().st_size), os.SEEK_END)
            ended = f.read() == b"\n"
        last: list[str] | None = None
        with _open(self.draft, "r") as text:
            rows = csv.reader(text)
            next(rows, None)
            for row, name in zip(rows, self.names, strict=False):
                if last is not None:
                    yield last
                if len(row) != len(HEAD) or row[0] != name:
                    return
                last = row
        if last is not None and ended:
            yield last


def _rows(names: Sequence[str], result: ExitResult, exit_names: Sequence[str]) -> Iterator[tuple[str, ...]]:
    for name, label, exit_, score in zip(names, result.labels, result.exits, result.scores, strict=True):
        used = label >= 0
        yield (name, str(label), exit_names[exit_] if used else "", f"{score:.6f}" if used else "")
