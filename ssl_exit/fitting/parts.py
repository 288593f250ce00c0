"""A fit of shards that never meet: each job writes its part of a step into a folder, and the parts are merged as files.

A job runs as far as merged values let it, writes its part of the next step, and stops. When all parts of a step are
there, `merge_parts` writes what they come to into every folder, and the jobs run again. Files hold numbers and names
alone: reading them executes nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Self

import numpy as np
import torch
from torch import nn

from ssl_exit.cascade.times import StageTimes
from ssl_exit.data.hashes import module_hash, settings_hash, tensors_hash
from ssl_exit.errors import InputError, shown
from ssl_exit.exits.certificate import SettingCounts
from ssl_exit.exits.statistics import ClusterStatistics
from ssl_exit.files import atomic_file, file_hash
from ssl_exit.fitting.count import Statistics
from ssl_exit.fitting.record import Logits
from ssl_exit.fitting.sample import Sample
from ssl_exit.fitting.shards import STEPS, Counted, Own, Shaping, Shard, Survey, Surveyed, T

KINDS = {
    kind.__name__: kind
    for kind in (Survey, Surveyed, Own, Sample, Statistics, ClusterStatistics, Shaping, Logits, StageTimes, Counted,
                 SettingCounts)
}  # fmt: skip
TOLD: dict[str, type] = {
    "sample": Survey, "statistics": Statistics, "placing": Shaping, "shaping": Shaping, "certifying": int,
    "counts": Counted,
}  # fmt: skip
KIND, ARRAY, DTYPE = "kind", "array", "dtype"  # keys of what stands for a dataclass and an array
PART, MERGED = {"after", "derived", "jobs", "step", "value"}, {"rank", "of", "value"}  # names in files
ALIKE = "run all jobs on machines of one kind, with the same versions and number of threads"


class PartWritten(Exception):
    """Not an error: a job has written its part of a step, and goes on when all parts are merged."""


class StoredShard(Shard):
    """One of several jobs, which need not run at the same time, nor on machines that know each other.

    Args:
        folder: of this job alone, for its parts; the same at every run. Files that end in .part are for the others, and
            those that end in .own stay.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._begin()

    def __enter__(self) -> Self:
        self._begin()
        return self

    def _begin(self) -> None:
        self.steps, self.jobs, self.after, self.derived = 0, 0, "", ""

    def same(self, make: Callable[[], T]) -> T:
        """Every job comes to it by itself; `merge_parts` checks that it is the same."""
        made = make()
        self.derived = settings_hash([self.derived, _digest(made)])
        return made

    def merged(self, step: str, part: Callable[[], tuple[Any, Any]]) -> tuple[Any, Any]:
        """What this job keeps to itself, and what the parts of all jobs come to.

        Raises:
            PartWritten: the step is not merged yet.
            InputError: a file of another fit, or a damaged one.
        """
        self.steps += 1
        file = self.folder / f"{self.steps}-{step}.part"
        if not file.is_file():
            value, own = part()
            write_part(file.with_suffix(".own"), {"value": own})
            write_part(
                file, {"after": self.after, "derived": self.derived, "jobs": self.jobs, "step": step, "value": value}
            )
        told, merged = read_part(file, PART), file.with_suffix(".merged")
        if told["after"] != self.after:
            raise InputError(f"{str(file)!r} was computed after another merged step; begin with an empty folder")
        if told["derived"] != self.derived:
            raise InputError(f"{str(file)!r} was computed with other clusters or rules than this run comes to: {ALIKE}")
        if not merged.is_file():
            raise PartWritten(f"part of step {self.steps} ({step}) written to {str(file)!r}")
        result = read_part(merged, MERGED)
        if result["of"][result["rank"]] != file_hash(file):
            raise InputError(f"{str(merged)!r} was merged from another part than {str(file)!r}; merge again")
        self.rank, self.jobs, self.after = result["rank"], len(result["of"]), settings_hash(result["of"])
        return read_part(file.with_suffix(".own"), {"value"})["value"], result["value"]


def merge_parts(folders: Sequence[str | Path]) -> str:
    """Merge the newest step of which every folder has a part, and write the result into every folder.

    Args:
        folders: of all jobs, the same ones at every step.

    Returns:
        What was merged, in a line.

    Raises:
        InputError: a folder without a part, or without one of the same step; or parts of different fits.
    """
    places = [Path(folder) for folder in folders]
    if len({place.resolve() for place in places}) < len(places):
        raise InputError("a folder of parts is named twice")
    parts_in = [sorted(place.glob("[1-9]-*.part")) for place in places]  # fewer than ten steps; no drafts
    if missing := [str(place) for place, files in zip(places, parts_in, strict=True) if not files]:
        raise InputError(f"there are no parts of a fit in {shown(missing)}: run their jobs first, with --part")
    last = min((files[-1] for files in parts_in), key=lambda file: file.name)  # all alike, unless a merge was killed
    files = [place / last.name for place in places]
    if last.with_suffix(".merged").is_file() and any(own[-1].name != last.name for own in parts_in):
        raise InputError(f"{str(last)!r} is a step behind the others: run its job again, then merge")
    if absent := [str(file) for file in files if not file.is_file()]:
        raise InputError(f"there is no {absent[0]!r}, which the others have a part like: begin with empty folders")
    _, _, step = files[0].stem.partition("-")
    if step not in STEPS:
        raise InputError(f"{str(files[0])!r} is no part of a fit")
    parts = [read_part(file, PART) for file in files]
    if jobs := next((part["jobs"] for part in parts if part["jobs"] not in (0, len(parts))), 0):
        raise InputError(f"steps before {step} were merged from {jobs} folders; name all of them, got {len(parts)}")
    if len({part["after"] for part in parts}) > 1:
        raise InputError(f"parts of step {step} were computed after different merged steps; begin with empty folders")
    if len({part["derived"] for part in parts}) > 1:
        raise InputError(f"before step {step} jobs came from the same numbers to different clusters or rules: {ALIKE}")
    value, hashes = STEPS[step]([part["value"] for part in parts]), [file_hash(file) for file in files]
    for rank, file in enumerate(files):
        write_part(file.with_suffix(".merged"), {"rank": rank, "of": hashes, "value": value})
    return f"step {files[0].stem.partition('-')[0]} ({step}) of {len(files)} parts merged; run the jobs again"


def write_part(file: Path, content: dict[str, Any]) -> None:
    """Write a part or a merged value; the file appears complete or not at all."""
    with atomic_file(file) as draft:
        torch.save({name: _plain(value) for name, value in content.items()}, draft)


def read_part(file: Path, names: set[str]) -> dict[str, Any]:
    """What `write_part` wrote under these names.

    Raises:
        InputError: it is damaged, or something else.
    """
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
        result = {name: _made(value) for name, value in dict(content).items()}
        if result.keys() != names or not isinstance(result["value"], TOLD.get(result.get("step", ""), object)):
            raise ValueError("it holds something else")
        return result
    except (OSError, UnpicklingError, RuntimeError, EOFError, KeyError, TypeError, ValueError, AttributeError) as error:
        reason = next(iter(str(error).splitlines()), "")
        raise InputError(f"{str(file)!r} is no part of a fit, or damaged: {reason}") from error


def _plain(value: Any) -> Any:
    """Tensors, numbers, names, lists and dictionaries in place of arrays and dataclasses."""
    if is_dataclass(value):
        own = {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
        return {KIND: type(value).__name__, **own}
    if isinstance(value, np.ndarray):
        return {ARRAY: torch.from_numpy(_signed(value)).clone(), DTYPE: str(value.dtype)}
    if isinstance(value, torch.Tensor):
        return value.cpu().clone()
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    return str(value) if isinstance(value, str) else value  # no subclass of it


def _signed(array: np.ndarray) -> np.ndarray:
    """Hashes as int64: torch 2.4 neither saves nor reads uint64."""
    whole = np.ascontiguousarray(array)
    return whole.view(np.int64) if whole.dtype == np.uint64 else whole


def _digest(value: Any) -> Any:
    """What JSON can hold, the same for equal values in any process."""
    if isinstance(value, nn.Module):
        return module_hash(value)
    if is_dataclass(value):
        return [_digest(getattr(value, f.name)) for f in fields(value)]
    if isinstance(value, list | tuple):
        return [_digest(one) for one in value]
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(_signed(value))
    return tensors_hash({"": value}) if isinstance(value, torch.Tensor) else str(value)


def _made(value: Any) -> Any:
    if isinstance(value, list):
        return [_made(one) for one in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {ARRAY, DTYPE}:
        array: np.ndarray = value[ARRAY].numpy()
        return array.view(np.uint64) if value[DTYPE] == "uint64" else array
    own = {name: _made(one) for name, one in value.items() if name != KIND}
    return KINDS[value[KIND]](**own) if KIND in value else own
