"""What a server asks and clients answer: arrays by name, checked before they count.

| question | what is told | what is answered |
| --- | --- | --- |
| hello | hashes of what must be in common | numbers of images, their shape, whether rows may be asked |
| start | nothing | centroids and sizes of the client's own k-means, sum and number of its descriptors |
| lloyd | centroids | sums and counts of the images nearest to each, and their squared distances |
| statistics | centroids, origin | counts, sums and scatter of descriptors by final cluster |
| losses | a cascade | -log p of the final cluster at every temperature of a grid, summed |
| rows | a cascade | label and score at every exit, and final label, of every image that shapes thresholds |
| trials | a cascade and settings | how many images leave at each exit, and how many disagree, of each setting |
| counts | a cascade and settings | the same by cluster, of images that certify |
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from ssl_exit.errors import InputError
from ssl_exit.exits.certificate import SettingCounts
from ssl_exit.exits.rules import LOG_TEMPERATURES as RANGE
from ssl_exit.exits.rules import WORST

Arrays = dict[str, np.ndarray]
LOG_TEMPERATURES = np.linspace(*RANGE, 141)  # of the question "losses"


@dataclass(frozen=True)
class Sizes:
    """What a client says of its images at first.

    Attributes:
        fit, shape, certify, skipped: numbers of images by what they are for.
        image: (C, H, W).
        rows: whether it answers with rows of labels and scores.
    """

    fit: int
    shape: int
    certify: int
    skipped: int
    image: tuple[int, ...]
    rows: bool

    def to_arrays(self) -> Arrays:
        return {f.name: np.asarray(getattr(self, f.name), dtype=np.int64) for f in fields(self)}

    @classmethod
    def of(cls, answer: Arrays) -> "Sizes":
        """Of an answer to "hello".

        Raises:
            InputError: no such answer.
        """
        _expect(answer, {f.name: ((3,) if f.name == "image" else (), np.int64) for f in fields(cls)})
        numbers = [int(answer[name]) for name in ("fit", "shape", "certify", "skipped")]
        if min(numbers) < 0 or max(numbers) > MOST_IMAGES:
            raise InputError(f"numbers of images must lie in 0 to {MOST_IMAGES:,}; got {numbers}")
        image = answer["image"].tolist()
        if min(image) < 1 or max(image) > MOST_PIXELS:
            raise InputError(f"images have sides of 1 to {MOST_PIXELS} pixels; got {image}")
        fit, shape, certify, skipped = numbers
        return cls(fit, shape, certify, skipped, tuple(image), bool(answer["rows"]))


MOST_IMAGES, MOST_PIXELS = 10**9, 4096  # of one client; of a side of an image as the encoder takes it


MOST = 1e15  # of any number that a client tells: k-means overflows beyond


def check_start(answer: Arrays, sizes: Sizes, k: int, n_features: int, dim: int, spherical: bool) -> None:
    """Of "start": K or fewer centroids, (k', F), their sizes, (k',), and the sum of all descriptors, (dim,)."""
    own = min(k, sizes.fit, len(answer["counts"]) if "counts" in answer and answer["counts"].ndim else 0)
    _expect(answer, {"centroids": ((own, n_features), np.float32), "counts": ((own,), np.int64),
                     "descriptors": ((dim,), np.float64), "n": ((), np.int64)})  # fmt: skip
    _expect_counts(answer["counts"], sizes.fit)
    _expect_counts(answer["n"], sizes.fit)
    if (answer["counts"] == 0).any():
        raise InputError("a centroid is told of without images")
    if spherical and (np.linalg.norm(answer["centroids"].astype(np.float64), axis=1) > 1 + 1e-4).any():
        raise InputError("a direction is longer than 1")


def check_lloyd(answer: Arrays, sizes: Sizes, k: int, n_features: int, spherical: bool) -> None:
    """Of "lloyd": sums, (K, F), counts, (K,), and inertia; directions have length 1, so their sums are bounded."""
    _expect(answer, {"sums": ((k, n_features), np.float64), "counts": ((k,), np.int64), "inertia": ((), np.float64)})
    counts = answer["counts"]
    _expect_counts(counts, sizes.fit)
    if answer["inertia"] < 0:
        raise InputError("a sum of squared distances is negative")
    if (np.linalg.norm(answer["sums"], axis=1) > (counts * (1 + 1e-4) if spherical else np.inf)).any():
        raise InputError("a sum of directions is longer than their number")
    if answer["sums"][counts == 0].any():
        raise InputError("a cluster without images has a sum")


def check_statistics(answer: Arrays, sizes: Sizes, k: int, dims: list[int], scatter: bool) -> None:
    """Of "statistics": counts_i, sums_i and the lower triangle scatter_i of every i; by Cauchy-Schwarz no entry of the
    diagonal is less than the sums allow."""
    wanted: dict[str, tuple[tuple[int, ...], type]] = {}
    for i, dim in enumerate(dims):
        wanted |= {f"counts_{i}": ((k,), np.float64), f"sums_{i}": ((k, dim), np.float64)}
        wanted |= {f"scatter_{i}": ((dim * (dim + 1) // 2,), np.float32)} if scatter else {}
    _expect(answer, wanted)
    for i in range(len(dims)):
        counts, sums = answer[f"counts_{i}"], answer[f"sums_{i}"]
        _expect_counts(counts, sizes.fit)
        if sums[counts == 0].any():
            raise InputError("a cluster without images has a sum")
        if not scatter:
            continue
        own, least = symmetric(answer[f"scatter_{i}"]).diagonal(), (sums**2 / np.maximum(counts, 1)[:, None]).sum(0)
        if (own < least * (1 - 1e-5) - 1e-5).any():
            raise InputError("a scatter is not that of any descriptors with these sums")


def check_losses(answer: Arrays, sizes: Sizes, n_exits: int) -> None:
    """Of "losses": (E, T), and the number of images behind them."""
    _expect(answer, {"losses": ((n_exits, len(LOG_TEMPERATURES)), np.float64), "n": ((), np.int64)})
    _expect_counts(answer["n"], sizes.shape)
    if (answer["losses"] < 0).any() or (answer["losses"] > WORST * answer["n"] + 1e-6).any():
        raise InputError(f"losses lie beyond 0 to {WORST:.0f} an image")


def check_rows(answer: Arrays, sizes: Sizes, n_exits: int, k: int) -> None:
    """Of "rows": labels and scores, (n, E), and final labels, (n,)."""
    n = len(answer["final"]) if "final" in answer and answer["final"].ndim == 1 else 0
    _expect(answer, {"labels": ((n, n_exits), np.int64), "scores": ((n, n_exits), np.float32),
                     "final": ((n,), np.int64)}, but="scores")  # fmt: skip
    _expect_counts(np.asarray(n), sizes.shape)
    labels, scores = np.append(answer["labels"].ravel(), answer["final"]), answer["scores"]
    if ((labels < 0) | (labels >= k)).any() or ((scores < 0) | (scores > 1)).any():
        raise InputError(f"labels lie beyond 0 to {k - 1}, or scores beyond [0, 1]")


def check_trials(answer: Arrays, sizes: Sizes, n_settings: int, n_exits: int) -> None:
    """Of "trials": left, (S, E), wrong, (S,), and n."""
    _expect(answer, {"left": ((n_settings, n_exits), np.int32), "wrong": ((n_settings,), np.int32),
                     "n": ((), np.int64)})  # fmt: skip
    _expect_counts(answer["n"], sizes.shape)
    left = answer["left"].sum(1)
    if (
        (answer["left"] > sizes.shape).any()
        or (answer["left"] < 0).any()
        or (answer["wrong"] < 0).any()
        or (left > answer["n"]).any()
    ):
        raise InputError("counts are negative, or more images leave than there are")
    if (answer["wrong"] > left).any():
        raise InputError("more images disagree than leave")


def check_counts(answer: Arrays, sizes: Sizes, n_settings: int, n_exits: int, k: int) -> None:
    """Of "counts": those of `SettingCounts`, as `narrow` makes them."""
    cells = (n_settings, n_exits, k)
    shapes = {"left": cells, "wrong": cells, "of_cluster": (k,), "wrong_of_cluster": (n_settings, k),
              "ever_wrong": (n_settings,)}  # fmt: skip
    if any(value.dtype.kind not in "iu" for value in answer.values()):
        raise InputError("counts must be whole numbers")
    wide = {name: value.astype(np.int64) for name, value in answer.items()}
    _expect(wide, {name: (shape, np.int64) for name, shape in shapes.items()})
    if any(((value < 0) | (value > sizes.certify)).any() for value in wide.values()):  # before a sum overflows
        raise InputError(f"counts lie beyond 0 to {sizes.certify}")
    counts = SettingCounts(**wide)
    _expect_counts(counts.of_cluster, sizes.certify)
    of_each, left = counts.of_cluster[None], counts.left
    if (left.sum((1, 2)) > counts.n).any() or (counts.wrong > left).any() or (counts.wrong_of_cluster > of_each).any():
        raise InputError("more images leave or disagree than there are")
    same = counts.wrong.sum((1, 2)) == counts.disagreements
    grows = (np.diff(counts.ever_wrong, prepend=0) >= 0) & (counts.ever_wrong >= counts.disagreements)
    if not (same & grows).all():
        raise InputError("counts by exit and by cluster do not fit")


def widened(answer: Arrays) -> SettingCounts:
    """The counts that `narrow` made small."""
    return SettingCounts(**{name: value.astype(np.int64) for name, value in answer.items()})


def narrow(counts: SettingCounts) -> Arrays:
    """Counts in the smallest integers that hold them."""
    values = {f.name: getattr(counts, f.name) for f in fields(counts)}
    return {name: value.astype(np.min_scalar_type(int(value.max(initial=0)))) for name, value in values.items()}


def triangle(matrix: np.ndarray) -> np.ndarray:
    """The lower triangle of a symmetric matrix, (D, D) -> (D (D + 1) / 2,) float32."""
    return matrix[np.tril_indices(len(matrix))].astype(np.float32)


def symmetric(values: np.ndarray) -> np.ndarray:
    """The symmetric matrix of a lower triangle, (D (D + 1) / 2,) -> (D, D) float64."""
    dim = int(np.sqrt(2 * len(values)))
    matrix = np.zeros((dim, dim))
    matrix[np.tril_indices(dim)] = values
    return matrix + np.tril(matrix, -1).T


def size_of(arrays: Mapping[str, np.ndarray]) -> int:
    """Bytes of the arrays."""
    return sum(int(value.nbytes) for value in arrays.values())


Ask = Callable[[str, Arrays, Any], dict[int, "Arrays | str"]]
"""A transport: question, what is told, the clients to ask (None: all there are) -> what came back in time, by client:
its answer, or the reason why it has none. A client that did not answer is not in it."""


def _expect(answer: Arrays, wanted: Mapping[str, tuple[tuple[int, ...], type]], but: str = "") -> None:
    """Raise InputError unless names, shapes and types are as wanted and, but for one, all numbers finite."""
    if answer.keys() != wanted.keys():
        raise InputError(f"expected arrays {sorted(wanted)}; got {sorted(answer)}")
    for name, (shape, kind) in wanted.items():
        value = answer[name]
        if value.shape != shape or value.dtype != kind:
            raise InputError(f"{name} must be {np.dtype(kind)} of shape {shape}; got {value.dtype} of {value.shape}")
        if name != but and not np.isfinite(value).all():
            raise InputError(f"{name} is not finite")
        if value.dtype.kind == "f" and (np.abs(value) > MOST).any():
            raise InputError(f"{name} has numbers beyond {MOST:g}")


def _expect_counts(counts: np.ndarray, n: int) -> None:
    """Raise InputError unless whole numbers, none negative, come to n at most."""
    if (counts < 0).any() or (counts > n).any() or (counts != np.floor(counts)).any() or counts.sum() > n:
        raise InputError(f"counts of images must come to at most {n}; got {counts.sum():g}")
