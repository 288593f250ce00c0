"""The engine: queues of survivors between segments of an encoder, each run at one shape.

Consecutive stages without an exit that lets anything leave between them are run as one segment. Images in a stream
wait in one queue a segment. A segment runs as soon as its queue holds a full batch, the deepest first, so every
segment runs at one shape and memory stays below two batches a segment; what is left is flushed at the end. A single
batch goes through directly; its survivors are compacted where measured times say that this pays.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from ssl_exit.data.images import Batch

if TYPE_CHECKING:
    from ssl_exit.cascade import Cascade

NOT_FINITE = "pixels or features are NaN or infinite"


@dataclass(frozen=True)
class ExitResult:
    """What became of each image, in input order.

    Attributes:
        labels: final cluster, (N,) int64; -1 for an image that could not be used.
        exits: index of the exit it left at, (N,) int64; the number of exits means the end.
        scores: its score there, (N,) float32; 1 at the end, NaN for an image that could not be used.
        cost: multiply-adds that its exit takes, exits' own included / those of the whole encoder, (N,) float64; NaN
            for an image that could not be used. Where a single batch is not compacted, more is computed.
        skipped: position and reason of every image that could not be used.
        audited: label of the whole encoder for images that left early and went on to the end all the same, (N,) int64;
            -1 for all others.
    """

    labels: np.ndarray
    exits: np.ndarray
    scores: np.ndarray
    cost: np.ndarray
    skipped: dict[int, str]
    audited: np.ndarray


class Segment(nn.Module):
    """Stages run as one, and the exit at their end, or the end of the encoder.

    Attributes:
        stages: their indices.
        exit: the index of the exit at which images may leave; None at the end of the encoder.
        described: exits whose descriptor is taken on the way, because this exit or a later one sees it.
        asked: exits whose rule answers on the way; the last is `exit`.
    """

    def __init__(
        self, cascade: "Cascade", stages: range, exit_: int | None, described: Sequence[int], asked: Sequence[int]
    ) -> None:
        super().__init__()
        self.stages, self.exit, self.described, self.asked = stages, exit_, described, asked
        tapped, rules = cascade.tapped, cascade.exit_rules
        descriptors = [tapped.descriptors[i] if i in described else None for i in stages]
        asks = [rules[i] if i in asked else None for i in stages]
        self._steps = list(zip(list(tapped.staged.stages)[stages.start : stages.stop], descriptors, asks, strict=True))
        self._output, self._accumulate = tapped.output, tapped.accumulate
        self._final, self._across = cascade.final, cascade.across

    def forward(
        self, x: Tensor, described: Tensor, carried: Tensor, thresholds: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """One run.

        Args:
            x: the tensor at the exit point before, (N, ...).
            described: descriptors so far, (N, d).
            carried: what exits carry on, (N, width).
            thresholds: of `exit`, (K,).

        Returns:
            The first three after this segment; labels, scores and who leaves here, (N,) each. At the end of the
            encoder all leave, with score 1, or NaN where the label is -1.
        """
        for i, (stage, descriptor, rule) in zip(self.stages, self._steps, strict=True):
            x = stage(x)
            if descriptor is not None:
                seen = descriptor(x)
                if self._accumulate:
                    seen = described = torch.cat([described, seen], dim=1)
            if rule is not None:
                labels, scores, carried = self._across.decide(rule, rule.logits(seen), carried, i)
        if self.exit is None:
            labels = self._final(self._output(x))
            scores = torch.where(labels >= 0, 1.0, torch.nan)
            return x, described, carried, labels, scores, torch.ones_like(labels, dtype=torch.bool)
        return x, described, carried, labels, scores, scores >= thresholds.index_select(0, labels)


@dataclass(frozen=True)
class Plan:
    """What a cascade runs while certain exits let images leave.

    Attributes:
        segments: one after another.
        used: whether each exit works, (E,) bool.
        costs: multiply-adds spent when leaving at each exit and at the end / the whole encoder's, (E + 1,); exits at
            which nothing can leave, and that no later one builds on, do no work.
    """

    segments: list[Segment]
    used: np.ndarray
    costs: np.ndarray


def segments(cascade: "Cascade", live: Sequence[bool]) -> list[Segment]:
    """Cut a cascade at its live exits: those that let an image leave."""
    used = used_exits(cascade, live)
    carries = cascade.across.width(1) > 0
    found, begin = [], 0
    last = len(live)
    for exit_ in [*np.flatnonzero(live).tolist(), None]:
        stages = range(begin, (last if exit_ is None else exit_) + 1)
        described = [i for i in stages if i < last and used[i]]
        asked = described if carries else [i for i in described if i == exit_]
        found.append(Segment(cascade, stages, exit_, described, asked))
        begin = stages.stop
    return found


def used_exits(cascade: "Cascade", live: Sequence[bool]) -> np.ndarray:
    """Which exits work at all, (E,) bool: live ones, and those before one where exits build on each other."""
    here = np.asarray(live, dtype=bool)
    depends = cascade.tapped.accumulate or cascade.across.width(1) > 0
    return np.logical_or.accumulate(here[::-1])[::-1] if depends else here


class Run:
    """One pass over images: the queues, and the results as they come in."""

    def __init__(self, cascade: "Cascade", n: int, batch_size: int, audit: np.ndarray | None = None) -> None:
        self.cascade, self.n, self.batch_size = cascade, n, batch_size
        device = cascade.thresholds.device
        self.plan, self.compiled = cascade.plan(), cascade.compiles
        self.segments = self.plan.segments
        self.last = len(cascade.rules)
        room = 2 * batch_size if self.compiled else min(2 * batch_size, n)  # padding takes full batches
        self.queues = [_Queue(room, self.compiled) for _ in self.segments]
        self.labels = torch.full((n,), -1, dtype=torch.int64, device=device)
        self.exits = torch.full((n,), self.last, dtype=torch.int64, device=device)
        self.scores = torch.full((n,), torch.nan, device=device)
        self.finite = torch.ones(n, dtype=torch.bool, device=device)
        self.audit = None if audit is None else torch.from_numpy(audit).to(device)
        self.audited = self.labels.clone()
        self.lingering = audit is not None  # whether images that left may still be among those that run
        self.skipped: dict[int, str] = {}

    @torch.inference_mode()
    def push(self, batch: Batch) -> None:
        """Take in one batch and run whatever segments it fills."""
        self.skipped.update(batch.skipped)
        if len(batch.indices) == 0:
            return
        x = self.cascade.tapped.enter(batch.images)
        indices = batch.indices.to(x.device, non_blocking=True)
        self.finite[indices] = finite_images(batch.images).to(x.device, non_blocking=True)
        carried = self.cascade.across.begin(len(x), self.cascade.final.n_clusters, x.device)
        entering = _Wave(x, torch.empty(len(x), 0, device=x.device), carried, indices)
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
        """Flush the queues and hand out the result."""
        for i, queue in enumerate(self.queues):
            if len(queue):
                self._advance(i, queue.take(self.batch_size))
                self._drain()
        found = self.labels, self.exits, self.scores, self.audited, self.finite
        labels, exits, scores, audited, finite = (values.cpu().numpy() for values in found)
        never = ~finite | (labels < 0)
        labels[never], exits[never], scores[never], audited[never] = -1, self.last, np.nan, -1
        spent = self.plan.costs[np.where(audited >= 0, self.last, exits)]
        cost = np.where(labels >= 0, spent, np.nan)
        return ExitResult(labels, exits, scores, cost, self.skipped | not_finite(labels, self.skipped), audited)

    def _drain(self) -> None:
        """Run full batches, the deepest first, until every queue holds less than one."""
        while (ready := max((i for i, q in enumerate(self.queues) if len(q) >= self.batch_size), default=-1)) >= 0:
            self._advance(ready, self.queues[ready].take(self.batch_size))

    def _advance(self, i: int, wave: "_Wave") -> None:
        """Run a segment on at most one batch; survivors move into the next queue."""
        if self.compiled:
            torch.compiler.cudagraph_mark_step_begin()
        found = self._step(i, wave)
        if found is not None:
            self.queues[i + 1].put(*found)

    def _through(self, wave: "_Wave") -> None:
        """Take one batch to the end."""
        if self.compiled:
            torch.compiler.cudagraph_mark_step_begin()
        for i in range(len(self.segments)):
            found = self._step(i, wave)
            if found is None:
                return
            wave, rows = found
            if rows is not None:
                if len(rows) == 0:
                    return
                if self.cascade.compacting_pays(self.segments[i + 1], len(wave), len(rows)):
                    wave = wave.at(rows)
                else:
                    self.lingering = True

    def _step(self, i: int, wave: "_Wave") -> "tuple[_Wave, Tensor | None] | None":
        """Run segment i and write down who leaves.

        Returns:
            The wave behind it and the rows that go on, where None stands for all; None at the end of the encoder.
        """
        x, described, carried, labels, scores, leaves = self._run(self.segments[i], wave)
        exit_, at = self.segments[i].exit, wave.indices
        goes_on = ~leaves
        if self.lingering:
            here = self.exits[at] == self.last  # has not left yet
            if exit_ is None and self.audit is not None:
                self.audited[at] = torch.where(self.audit[at] & ~here, labels, -1)
            labels, scores = torch.where(here, labels, self.labels[at]), torch.where(here, scores, self.scores[at])
            leaves, goes_on = leaves & here, goes_on & here
            if self.audit is not None:
                goes_on |= self.audit[at]
        if exit_ is None:
            self.labels[at], self.scores[at] = labels, scores
            return None
        after = _Wave(x, described, carried, at)
        rows = goes_on.nonzero()[:, 0]  # here, and only here, the host waits for the device
        if len(rows) == len(at) and not self.lingering:
            return after, None
        self.labels[at], self.scores[at] = labels, scores  # those of survivors too: later exits overwrite them
        self.exits[at] = torch.where(leaves, exit_, self.exits[at])
        return after, rows

    def _run(self, segment: Segment, wave: "_Wave") -> list[Tensor]:
        compiled = self.compiled and len(wave.x) == self.batch_size
        found = self.cascade.call(segment, wave.x, wave.described, wave.carried, compiled=compiled)
        return [part[: len(wave)] for part in found] if len(wave) < len(wave.x) else list(found)


@torch.inference_mode()
def run_one(cascade: "Cascade", batch: Batch, audit: bool) -> ExitResult:
    """What `Run` would find for a single image, without queues: operations as small as these are paid for one by one.

    Args:
        cascade: not compiled for a batch of one.
        batch: one image, or none and the reason why.
        audit: whether it goes on to the end wherever it leaves.

    Returns:
        Arrays of shape (1,).
    """
    plan, last = cascade.plan(), len(cascade.rules)
    label, exit_, score, whole = -1, last, float("nan"), -1
    if len(batch.indices):
        x, finite = cascade.tapped.enter(batch.images), finite_images(batch.images)
        described = torch.empty(1, 0, device=x.device)
        carried = cascade.across.begin(1, cascade.final.n_clusters, x.device)
        for segment in plan.segments:
            x, described, carried, here, sure, leaves = cascade.call(segment, x, described, carried, compiled=False)
            if segment.exit is None:
                whole = int(here)
            if label < 0 and leaves:
                label, score, exit_ = int(here), float(sure), last if segment.exit is None else segment.exit
                if not audit:
                    break
        if label < 0 or not finite:
            label, exit_, score = -1, last, float("nan")
    audited = whole if audit and exit_ < last else -1
    labels = np.array([label])
    cost = np.array([plan.costs[last if audited >= 0 else exit_] if label >= 0 else np.nan])
    skipped = batch.skipped | not_finite(labels, batch.skipped)
    return ExitResult(labels, np.array([exit_]), np.array([score], np.float32), cost, skipped, np.array([audited]))


@dataclass(frozen=True)
class _Wave:
    """Images on their way: the tensor at an exit point, descriptors so far, what exits carry on, and positions.

    There may be more rows than positions: padding.
    """

    x: Tensor
    described: Tensor
    carried: Tensor
    indices: Tensor

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def parts(self) -> tuple[Tensor, ...]:
        return self.x, self.described, self.carried, self.indices

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
        """Copy the given rows of a wave (or all) in."""
        if not self.arrays:
            self.last = [_channels_last(part) for part in wave.parts]
        parts = [_rows(part, last) for part, last in zip(wave.parts, self.last, strict=True)]
        if not self.arrays:
            self.arrays = [part.new_empty(self.capacity, *part.shape[1:]) for part in parts]
            for array in self.arrays if self.pad else []:
                array.zero_()  # what pads must be finite
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
        stops = [first + most if self.pad else self.filled] * 3 + [self.filled]
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
    """What `_rows` was made of."""
    return rows.permute(0, 3, 1, 2) if last else rows


def finite_images(images: Tensor) -> Tensor:
    """Which images have finite pixels only: (N, C, H, W) -> (N,) bool."""
    return images.flatten(1).sum(1).isfinite()


def not_finite(labels: np.ndarray, known: dict[int, str]) -> dict[int, str]:
    """The reason for every label that is -1 without one."""
    return {int(i): NOT_FINITE for i in np.flatnonzero(labels < 0) if int(i) not in known}
