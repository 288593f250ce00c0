"""What shards of the images tell each other in a fit, and where they meet: in one process, or in many at a time.

Every step of a fit computes a part from the images of one shard; the parts of all shards merge into one value, the same
for all. What follows from merged values alone (final clusters, rules) is computed once, and sent to the others.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import reduce
from operator import add
from typing import Any, Self, TypeVar

import numpy as np

from ssl_exit.cascade.times import StageTimes
from ssl_exit.errors import InputError
from ssl_exit.exits.certificate import SettingCounts
from ssl_exit.fitting.record import Logits
from ssl_exit.fitting.sample import Sample

T = TypeVar("T")


@dataclass(frozen=True)
class Survey:
    """What a shard says of its images at the first look.

    Attributes:
        about: what all shards must have in common, hashes by name.
        wanted: images in the merged sample.
        sample: of its images to fit.
        held: content hashes of those that it holds out, each once, uint64.
    """

    about: dict[str, str]
    wanted: int
    sample: Sample
    held: np.ndarray


@dataclass(frozen=True)
class Own:
    """What a shard keeps of its images.

    Attributes:
        about: as in `Survey`.
        roles: what every image is for (see `ssl_exit.fitting.fit_shard`), (n,) int8.
        hashes: content hash of every image, (n,) uint64; 0 of those that could not be read.
        skipped: position and reason of those.
    """

    about: dict[str, str]
    roles: np.ndarray
    hashes: np.ndarray
    skipped: dict[int, str]


@dataclass(frozen=True)
class Surveyed:
    """What all shards say together: the sample of all, and the content hashes that each holds out."""

    sample: Sample
    held: list[np.ndarray]

    def before(self, rank: int) -> np.ndarray:
        """Content hashes of the images that shards before this one hold out."""
        return np.concatenate([np.empty(0, np.uint64), *self.held[:rank]])


@dataclass(frozen=True)
class Shaping:
    """What a shard says of held-out images that shape thresholds.

    Attributes:
        logits: of every exit.
        images: content hashes of the images, uint64.
        times: of stages and exits, as the shard measured them.
    """

    logits: Logits
    images: np.ndarray
    times: StageTimes


@dataclass(frozen=True)
class Counted:
    """What settings do to images that certify, and the content hashes of these, uint64."""

    counts: SettingCounts
    images: np.ndarray

    def __add__(self, other: "Counted") -> "Counted":
        return Counted(self.counts + other.counts, np.concatenate([self.images, other.images]))


def merge_surveys(parts: list[Survey]) -> Surveyed:
    """The sample of all shards.

    Raises:
        InputError: shards of different fits, or of the same images.
    """
    first = parts[0].about
    for rank, part in enumerate(parts[1:], start=1):
        if differ := sorted(name for name in first.keys() | part.about if first.get(name) != part.about.get(name)):
            raise InputError(f"shards 0 and {rank} are not of one fit: they differ in {', '.join(differ)}")
    for rank, part in enumerate(parts):
        for other in range(rank):
            if len(part.held) and np.array_equal(part.held, parts[other].held):
                raise InputError(f"shards {other} and {rank} have the same images: give each a share of its own")
    sample = reduce(lambda a, b: (a + b).lowest(parts[0].wanted), (part.sample for part in parts))
    return Surveyed(replace(sample, indices=sample.indices * 0 - 1), [part.held for part in parts])


def merge_shaping(parts: list[Shaping]) -> Shaping:
    """All logits; times of the first shard."""
    logits = reduce(add, (part.logits for part in parts))
    return Shaping(logits, np.concatenate([part.images for part in parts]), parts[0].times)


def merge_counts(parts: list[Any]) -> Any:
    """The sum."""
    return reduce(add, parts)


PATIENCE = timedelta(days=30)  # shards wait for the slowest, through whole passes over its images

STEPS: dict[str, Callable[[list[Any]], Any]] = {
    "sample": merge_surveys,
    "statistics": merge_counts,
    "placing": merge_shaping,
    "shaping": merge_shaping,
    "certifying": merge_counts,
    "counts": merge_counts,
}


class Shard:
    """The only shard there is.

    Attributes:
        rank: which of the shards this one is, from 0; known from the first merged step on.
    """

    rank = 0

    def merged(self, step: str, part: Callable[[], tuple[Any, Any]]) -> tuple[Any, Any]:
        """What this shard keeps to itself, and what the parts of all shards merge into.

        Args:
            step: one of `STEPS`.
            part: computes what it tells the others, and what it keeps.
        """
        told, own = part()
        return own, STEPS[step]([told])

    def same(self, make: Callable[[], T]) -> T:
        """What follows from merged values, the same in all shards."""
        return make()

    def first(self, make: Callable[[], T]) -> T:
        """What one shard measures."""
        return make()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None:
            self.fail(error)

    def fail(self, error: BaseException) -> None:
        """Tell the others that nothing will come of it."""


class DistributedShard(Shard):
    """One of several processes at a time, as torchrun, Lightning or Ray Train start them.

    What they say of their images goes over a gloo group of its own, whichever backend the default group has.

    Raises:
        InputError: torch.distributed is not initialized.
    """

    def __init__(self) -> None:
        from torch import distributed

        if not distributed.is_available() or not distributed.is_initialized():
            raise InputError(
                "torch.distributed is not initialized: start by torchrun, or call torch.distributed.init_process_group"
            )
        self.rank, self.size = distributed.get_rank(), distributed.get_world_size()
        self.group: Any = distributed.new_group(backend="gloo", timeout=PATIENCE)
        self.ended = False

    def merged(self, step: str, part: Callable[[], tuple[Any, Any]]) -> tuple[Any, Any]:
        told, own = part()
        return own, self._meet(told, None, STEPS[step])

    def same(self, make: Callable[[], T]) -> T:
        made = make() if self.rank == 0 else None
        result: T = self._meet(made, None, lambda parts: parts[0])
        return result

    first = same

    def fail(self, error: BaseException) -> None:
        if not self.ended:
            self._meet(None, f"shard {self.rank}: {_said(error)}", len)

    def _meet(self, own: Any, wrong: str | None, merge: Callable[[list[Any]], T]) -> T:
        """Every process calls this the same number of times: the first one merges what all say, or what went wrong."""
        from torch import distributed

        parts: list[Any] | None = [None] * self.size if self.rank == 0 else None
        answer: list[Any] = [None]
        error: BaseException | None = None
        try:
            distributed.gather_object((own, wrong), parts, dst=0, group=self.group)
            if parts is not None:
                reasons = [reason for _, reason in parts if reason is not None]
                try:
                    answer = [(None, reasons[0]) if reasons else (merge([part for part, _ in parts]), None)]
                except Exception as caught:
                    answer, error = [(None, _said(caught))], caught
            distributed.broadcast_object_list(answer, src=0, group=self.group)
        except RuntimeError as gone:  # of gloo
            self.ended = True
            if wrong is not None:
                raise
            raise InputError(f"another process of this fit is gone: {_said(gone)}") from gone
        value, reason = answer[0]
        if reason is not None:
            self.ended = True
            if error or wrong is None:
                raise error or InputError(reason)
        result: T = value
        return result


def _said(error: BaseException) -> str:
    """An error in one line, never an empty one."""
    text = next(iter(f"{error}".splitlines()), "")
    return text if isinstance(error, InputError) and text else f"{type(error).__name__}: {text}"
