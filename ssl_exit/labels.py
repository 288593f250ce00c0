"""Labels as CSV: one row an image, in input order: path, label, exit, score."""

import csv
import hashlib
from collections.abc import Iterator, Sequence
from io import StringIO
from pathlib import Path
from types import TracebackType
from typing import IO

from ssl_exit.engine import ExitResult
from ssl_exit.storage import whole_file

HEAD = ("path", "label", "exit", "score")


def _open(file: Path, mode: str) -> IO[str]:
    return open(file, mode, newline="", encoding="utf-8", errors="surrogateescape")


def write_labels(file: Path, names: Sequence[str], result: ExitResult, exit_names: Sequence[str]) -> None:
    """Write all rows at once; the file appears whole or not at all.

    An image that could not be used has label -1 and neither exit nor score.
    """
    with whole_file(file) as draft, _open(draft, "w") as f:
        writer = csv.writer(f)
        writer.writerow(HEAD)
        writer.writerows(_rows(names, result, exit_names))


class LabelsFile:
    """Rows written as they come, to a draft beside the file that takes its place when all are there.

    A run that was killed leaves its draft; the next one with the same key goes on behind its last whole row. The key
    is part of the draft's name, so that rows of another model or of other images are never gone on with.

    Attributes:
        begun: how many rows are there already.
    """

    def __init__(self, file: Path, names: Sequence[str], exit_names: Sequence[str], key: str) -> None:
        """Open the draft.

        Args:
            file: to appear in the end.
            names: of all images.
            exit_names: of the exits, and "end".
            key: what the rows depend on; names and exits are added to it.
        """
        self.file, self.names, self.exit_names = file, names, exit_names
        told = "\0".join([key, *exit_names, "", *names]).encode(errors="surrogateescape")
        self.draft = file.with_name(f".{file.name}-{hashlib.sha256(told).hexdigest()[:12]}.part")
        file.parent.mkdir(parents=True, exist_ok=True)
        kept = self._whole_rows()
        self.begun = len(kept)
        with whole_file(self.draft) as fresh, _open(fresh, "w") as f:
            csv.writer(f).writerows([HEAD, *kept])
        self._handle = _open(self.draft, "a")

    def add(self, result: ExitResult) -> None:
        """Append the rows of the next images."""
        end = self.begun + len(result.labels)
        csv.writer(self._handle).writerows(_rows(self.names[self.begun : end], result, self.exit_names))
        self._handle.flush()
        self.begun = end

    def __enter__(self) -> "LabelsFile":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._handle.close()
        if kind is None and self.begun == len(self.names):
            self.draft.replace(self.file)

    def _whole_rows(self) -> list[list[str]]:
        """Rows that an earlier run left: those up to the last line's end, as far as they are of these images."""
        if not self.draft.is_file():
            return []
        with _open(self.draft, "r") as f:
            text = f.read()
        rows = list(csv.reader(StringIO(text[: text.rfind("\n") + 1], newline="")))[1:]
        good = [len(row) == len(HEAD) and row[0] == name for row, name in zip(rows, self.names, strict=False)]
        return rows[: good.index(False) if False in good else len(good)]


def _rows(names: Sequence[str], result: ExitResult, exit_names: Sequence[str]) -> Iterator[tuple[str, ...]]:
    for name, label, exit_, score in zip(names, result.labels, result.exits, result.scores, strict=True):
        used = label >= 0
        yield (name, str(label), exit_names[exit_] if used else "", f"{score:.6f}" if used else "")
