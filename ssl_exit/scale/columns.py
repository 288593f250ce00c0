"""Images in columns, as engines for large data hold them, to columns of labels."""

import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ssl_exit.data.image_files import ImageFiles, Unreadable
from ssl_exit.data.images import ImageSource, open_images
from ssl_exit.errors import InputError, shown
from ssl_exit.exits.audit import DriftAudit
from ssl_exit.model import Model
from ssl_exit.storage import Supplied, load_model

COLUMNS = ("label", "exit", "score", "reason", "audited")


class LabelColumns:
    """Labels of images in a column; one object serves every worker, which loads the model once, at its first call.

    A cell of the column is an encoded image (bytes), its path, opened as it is in the worker, Hugging Face's mapping of
    either, or pixels, (H, W, C) or (H, W) uint8; where the model has no preprocessing, a tensor as the encoder takes
    it, (C, H, W).

    Args:
        model: folder of a model that every worker can read, or the fitted model itself, which is pickled.
        image_column: name of the column of images, which is left out of the result.
        id_column: the only other column that is kept; None (default) keeps all others.
        batch_size: images a segment runs on at a time, at most (default 32): every call ends with a flush of smaller
            batches, so a call should hold some 32 of them; a GPU wants larger batches, and then larger calls.
        audit: share of the images that leave early which go on to the end too; their rows then have its label under
            audited, and others -1 (see `audit_of`); None (default): as in fit.
        device: auto, cpu, cuda, ...
        max_pixels: of one image; larger ones are unreadable; None (default): as in fit.
        supplied: what the model does not hold, as in `ssl_exit.load`: encoder, front, head, transform, trust.

    Raises:
        InputError: an audit that is no share; at the first call: the folder is no model.
    """

    def __init__(
        self,
        model: str | Path | Model,
        image_column: str = "image",
        id_column: str | None = None,
        *,
        batch_size: int = 32,
        audit: float | None = None,
        device: str = "auto",
        max_pixels: int | None = None,
        **supplied: Any,
    ) -> None:
        if audit is not None and not 0 <= audit <= 1:
            raise InputError(f"audit must be a share in [0, 1]; got {audit}")
        self.source, self.image_column, self.id_column = model, image_column, id_column
        self.batch_size, self.audit, self.device, self.max_pixels = batch_size, audit, device, max_pixels
        self.supplied = Supplied(**supplied)

    @cached_property
    def model(self) -> Model:
        """The model, in this process."""
        return self.source if isinstance(self.source, Model) else load_model(self.source, self.supplied, self.device)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "model"}

    def __call__(self, columns: Any) -> Any:
        """Label one batch of rows.

        Args:
            columns: a mapping of names to arrays or lists, (N,) each, or a pyarrow.Table.

        Returns:
            The same kind, with the columns that are kept and, for every row, label (int64; -1: unusable), exit (its
            name), score (float32) and reason (why an image is unusable, else empty); with an audit, audited (int64).

        Raises:
            InputError: no such column, or one that is kept is called as one of the results.
        """
        if isinstance(columns, Mapping):
            names, cells = list(columns), columns.get(self.image_column)
        else:
            names = columns.column_names
            cells = columns[self.image_column].to_pylist() if self.image_column in names else None
        kept = self._kept(names)
        result = self._labels([] if cells is None else list(cells))
        if isinstance(columns, Mapping):
            return {name: columns[name] for name in kept} | result
        for name in set(names) - set(kept):
            columns = columns.drop_columns([name])
        for name, values in result.items():
            columns = columns.append_column(name, [values])
        return columns

    def _kept(self, names: Sequence[str]) -> list[str]:
        wanted = [self.image_column, *([] if self.id_column is None else [self.id_column])]
        if missing := [name for name in wanted if name not in names]:
            raise InputError(f"there is no column {shown(missing)}; there are {shown(list(names))}")
        kept = [name for name in names if name != self.image_column]
        kept = kept if self.id_column is None else [self.id_column]
        if taken := [name for name in kept if name in COLUMNS]:
            raise InputError(f"columns {shown(taken)} are called as those of the result; rename them, or set id_column")
        return kept

    def _labels(self, cells: list[Any]) -> dict[str, np.ndarray]:
        n, model = len(cells), self.model
        share = model.settings.calibration.audit if self.audit is None else self.audit
        if n == 0:
            empty: dict[str, Any] = {"label": np.int64, "exit": str, "score": np.float32, "reason": str}
            more = {"audited": np.int64} if share else {}
            return {name: np.empty(0, kind) for name, kind in (empty | more).items()}
        batch = min(self.batch_size, model.settings.batch_size)
        chosen = np.random.default_rng().random(n) < share if share else None
        result = model.run(self._images(cells).batches(np.arange(n), batch), n, batch, chosen)
        reasons = np.array([result.skipped.get(i, "") for i in range(n)], dtype=str)
        exits = np.where(result.labels >= 0, np.array(model.cascade.exit_names, dtype=str)[result.exits], "")
        rows = {"label": result.labels, "exit": exits, "score": result.scores, "reason": reasons}
        return rows | ({"audited": result.audited} if share else {})

    def _images(self, cells: list[Any]) -> ImageSource:
        max_pixels = self.max_pixels or self.model.settings.runtime.max_pixels
        return open_images(_Cells(cells, self.model.preprocessing or _Tensors(self.model.image_shape), max_pixels))


def audit_of(rows: Iterable[Mapping[str, Any]], model: Model, share: float | None = None) -> DriftAudit:
    """One audit of the rows of all workers, which so share one probability of a false alarm.

    Args:
        rows: parts of them with columns label and audited, in any order that does not depend on these.
        model: that labelled them.
        share: of the images that leave early that were audited; None (default): as in fit.
    """
    how = model.settings.calibration
    audit = DriftAudit(model.certificate.max_disagreement, how.audit if share is None else share, how.false_alarm)
    rng = np.random.default_rng(model.settings.random_state)
    for part in rows:
        audit.take(np.asarray(part["label"]), np.asarray(part["audited"]), rng)
    return audit


class _Cells(ImageFiles):
    """Images in the cells of a column."""

    def __init__(self, cells: list[Any], preprocessing: Any, max_pixels: int) -> None:
        super().__init__([str(row) for row in range(len(cells))], preprocessing, max_pixels)
        self.cells = cells

    def read(self, index: int, transform: Callable[[Any], Any]) -> Any:
        cell = self.cells[index]
        return transform(cell) if isinstance(transform, _Tensors) else self._read(cell, transform)

    def _read(self, cell: Any, transform: Callable[[Image.Image], Any]) -> Any:
        if isinstance(cell, Mapping):
            cell = cell.get("bytes") or cell.get("path")
        if isinstance(cell, bytes):
            return self.decoded(io.BytesIO(cell), transform)
        if isinstance(cell, (str, Path)):
            return self.decoded(cell, transform)
        try:
            pixels = np.asarray(cell)
            if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3):
                return Unreadable(f"no image: expected bytes, a path or uint8 pixels, (H, W, C); got {shown(cell)}")
            return transform(Image.fromarray(pixels.squeeze(2) if pixels.shape[2:] == (1,) else pixels))
        except Exception as error:  # of any type, as decoders raise
            return Unreadable(f"{type(error).__name__}: {error}")


@dataclass(frozen=True)
class _Tensors:
    """In place of a preprocessing: cells that hold images as the encoder takes them, of one shape, (C, H, W)."""

    shape: tuple[int, ...]

    def __call__(self, cell: Any) -> Any:
        try:
            tensor = torch.as_tensor(cell, dtype=torch.float32)
        except (TypeError, ValueError, RuntimeError) as error:
            return Unreadable(f"no image: expected numbers, {self.shape}; got {shown(cell)} ({error})")
        return tensor if tensor.shape == self.shape else Unreadable(f"expected {self.shape}; got {tuple(tensor.shape)}")
