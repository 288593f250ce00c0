"""The engine: queues of survivors between the segments of a plan, each run at one shape.

Images in a stream wait in one queue a segment. A segment runs as soon as its queue holds a full batch, the deepest
first, so every segment runs at one shape and memory stays below two batches a segment; what is left is flushed at the
end. A single batch goes through directly; its survivors are compacted where measured times say that this pays.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from ssl_exit.cascade.cascade import finite_images
from ssl_exit.cascade.plan import Plan
from ssl_exit.cascade.result import NOT_FINITE, ExitResult
from ssl_exit.data.images import Batch
from ssl_exit.data.transfer import on_device
from ssl_exit.errors import InputError


def run(plan: Plan, batches: Iterable[Batch], n: int, batch_size: int, audit: np.ndarray | None = None) -> ExitResult:
    """Cluster images with early exits.

    Args:
        plan: what to run.
        batches: images with positions 0 to n - 1, each at most once.
        n: how many images there are in all.
        batch_size: images a segment runs on at a time.
        audit: which images go on to the end wherever they leave, (n,) bool; None: none.

    Returns:
        Labels, exits, scores and cost of every image, in the order of its position.
    """
    current = Run(plan, n, batch_size, audit)
    for batch in on_device(batches, plan.cascade.device):
        current.push(batch)
    return current.finish()


class Run:
    """One pass over images: the queues, and the results as they come in."""

    def __init__(self, plan: Plan, n: int, batch_size: int, audit: np.ndarray | None = None) -> None:
        self.plan, self.n, self.batch_size = plan, n, batch_size
        device = plan.cascade.device
        self.last = len(plan.cascade.rules)
        room = 2 * batch_size if plan.compiled else min(2 * batch_size, n)  # padding takes full batches
        self.queues = [_Queue(room, plan.compiled) for _ in plan.segments]
        self.labels = torch.full((n,), -1, dtype=torch.int64, device=device)
        self.exits = torch.full((n,), self.last, dtype=torch.int64, device=device)
        self.scores = torch.full((n,), torch.nan, device=device)
        self.finite = torch.ones(n, dtype=torch.bool, device=device)
        self.audit = None if audit is None else torch.from_numpy(audit).to(device)
        self.audited = self.labels.clone()
        self.lingering = audit is not None  # whether images that left may still be among those that run
        self.skipped: dict[int, str] = {}
        self.came = 0

    @torch.inference_mode()
    def push(self, batch: Batch) -> None:
        """Take in one batch and run whatever segments it fills."""
        self.skipped.update(batch.skipped)
        self.came += len(batch.indices) + len(batch.skipped)
        if len(batch.indices) == 0:
            return
        x, memory = self.plan.enter(batch.images)
        indices = batch.indices.to(x.device, non_blocking=True)
        self.finite[indices] = finite_images(batch.images).to(x.device, non_blocking=True)
        entering = _Wave(x, memory, indices)
        if self.n == len(indices) + len(batch.skipped) <= self.batch_size:
            self._through(entering)
            return
        if len(indices) == self.batch_size:
            self._advance(0, entering)  # a full batch need not wait
        else:
            self.queues[0].put(entering, None)
        self._drain()

    @torch.inference_mode()
    def finish(self) -> ExitResult:
        """Flush the queues and return the result.

        Raises:
            InputError: fewer images came than the run is for.
        """
        if self.came != self.n:
            raise InputError(f"{self.came} images came where {self.n} were promised; the data end early")
        for i, queue in enumerate(self.queues):
            if len(queue):
                self._advance(i, queue.take(self.batch_size))
                self._drain()
        arrays = self.labels, self.exits, self.scores, self.audited, self.finite
        labels, exits, scores, audited, finite = (values.cpu().numpy() for values in arrays)
        never = ~finite | (labels < 0)
        labels[never], exits[never], scores[never], audited[never] = -1, self.last, np.nan, -1
        spent = self.plan.costs[np.where(audited >= 0, self.last, exits)]
        cost = np.where(labels >= 0, spent, np.nan)
        reasons = dict.fromkeys(np.flatnonzero(never).tolist(), NOT_FINITE) | self.skipped
        return ExitResult(labels, exits, scores, cost, reasons, audited)

    def _drain(self) -> None:
        """Run full batches, the deepest first, until every queue holds less than one."""
        while (ready := max((i for i, q in enumerate(self.queues) if len(q) >= self.batch_size), default=-1)) >= 0:
            self._advance(ready, self.queues[ready].take(self.batch_size))

    def _advance(self, i: int, wave: "_Wave") -> None:
        """Run a segment on at most one batch; survivors move into the next queue."""
        if self.plan.compiled:
            torch.compiler.cudagraph_mark_step_begin()
        survivors = self._step(i, wave)
        if survivors is not None:
            self.queues[i + 1].put(*survivors)

    def _through(self, wave: "_Wave") -> None:
        """Take one batch to the end."""
        if self.plan.compiled:
            torch.compiler.cudagraph_mark_step_begin()
        for i in range(len(self.plan.segments)):
            survivors = self._step(i, wave)
            if survivors is None:
                return
            wave, rows = survivors
            if rows is not None:
                if len(rows) == 0:
                    return
                if self.plan.compacting_pays(self.plan.segments[i + 1], len(wave), len(rows)):
                    wave = wave.at(rows)
                else:
                    self.lingering = True

    def _step(self, i: int, wave: "_Wave") -> "tuple[_Wave, Tensor | None] | None":
        """Run segment i and note who leaves.

        Returns:
            The wave behind it and the rows that go on, where None stands for all; None at the end of the encoder.
        """
        segment, where = self.plan.segments[i], wave.indices
        outputs = self.plan.call(segment, wave.x, wave.memory, full_batch=len(wave.x) == self.batch_size)
        if len(wave) < len(wave.x):  # padding
            outputs = tuple(part[: len(wave)] for part in outputs)
        x, memory, labels, scores, leaves = outputs
        goes_on = ~leaves
        if self.lingering:
            here = self.exits[where] == self.last  # has not left yet
            if segment.exit is None and self.audit is not None:
                self.audited[where] = torch.where(self.audit[where] & ~here, labels, -1)
            labels = torch.where(here, labels, self.labels[where])
            scores = torch.where(here, scores, self.scores[where])
            leaves, goes_on = leaves & here, goes_on & here
            if self.audit is not None:
                goes_on |= self.audit[where]
        if segment.exit is None:
            self.labels[where], self.scores[where] = labels, scores
            return None
        after = _Wave(x, memory, where)
        rows = goes_on.nonzero()[:, 0]  # here, and only here, the host waits for the device
        if len(rows) == len(where) and not self.lingering:
            return after, None
        self.labels[where], self.scores[where] = labels, scores  # those of survivors too: later exits overwrite them
        self.exits[where] = torch.where(leaves, segment.exit, self.exits[where])
        return after, rows


@dataclass(frozen=True)
class _Wave:
    """Images on their way: the tensor at an exit point, their memory (see `Segment`) and positions.

    There may be more rows than positions: padding.
    """

    x: Tensor
    memory: Tensor
    indices: Tensor

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def parts(self) -> list[Tensor]:
        return [getattr(self, f.name) for f in fields(self)]

    def at(self, rows: Tensor) -> "_Wave":
        last = [_channels_last(part) for part in self.parts]
        return _Wave(*(_tensor(_rows(p, cl).index_select(0, rows), cl) for p, cl in zip(self.parts, last, strict=True)))


class _Queue:
    """Survivors waiting for a segment, in arrays allocated once: small tensors kept alive fragment the heap."""

    def __init__(self, capacity: int, pad: bool) -> None:
        self.capacity, self.pad, self.filled = capacity, pad, 0
        self.arrays: list[Tensor] = []

    def __len__(self) -> int:
        return self.filled

    def put(self, wave: _Wave, rows: Tensor | None) -> None:
        """Copy some rows of a wave, or all, in."""
        if not self.arrays:
            self.last = [_channels_last(part) for part in wave.parts]
        parts = [_rows(part, last) for part, last in zip(wave.parts, self.last, strict=True)]
        if not self.arrays:
            self.arrays = [part.new_empty(self.capacity, *part.shape[1:]) for part in parts]
            for array in self.arrays if self.pad else []:
                array.zero_()  # padding must be finite
        count = len(wave) if rows is None else len(rows)
        for array, part in zip(self.arrays, parts, strict=True):
            target = array[self.filled : self.filled + count]
            if rows is None:
                target.copy_(part[:count])
            else:
                torch.index_select(part, 0, rows, out=target)
        self.filled += count

    def take(self, most: int) -> _Wave:
        """The last images put in, at most `most` (padded to so many if wanted); to be used before the next `put`."""
        first = max(0, self.filled - most)
        stops = [first + most if self.pad else self.filled] * 2 + [self.filled]
        parts = [array[first:stop] for array, stop in zip(self.arrays, stops, strict=True)]
        wave = _Wave(*(_tensor(part, last) for part, last in zip(parts, self.last, strict=True)))
        self.filled = first
        return wave


def _channels_last(x: Tensor) -> bool:
    return x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)


def _rows(x: Tensor, last: bool) -> Tensor:
    """A view, or where there is none a copy, in which every image lies in one piece: maps as (N, H, W, C) if `last`."""
    return (x.permute(0, 2, 3, 1) if last else x).contiguous()


def _tensor(rows: Tensor, last: bool) -> Tensor:
    """The inverse of `_rows`."""
    return rows.permute(0, 3, 1, 2) if last else rows
