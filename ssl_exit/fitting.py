"""One pass over the images: a sample for k-means first, then statistics as they stream by.

What is held in memory, beside one batch: the descriptors and final features of a random sample (10,000 images,
or 256 a cluster if that is more; 50,000 for trained heads; up to 512 MB of descriptors), on whose first part k-means
runs and from which some rules are made; and the statistics, of which the scatter of the descriptors, D x D, is
the largest.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ssl_exit.cascade import Cascade, exit_costs
from ssl_exit.data.images import Batch, ImageSource
from ssl_exit.data.transfer import on_device
from ssl_exit.encoders.tapped import TappedEncoder
from ssl_exit.engine import NOT_FINITE, finite_images
from ssl_exit.errors import InputError
from ssl_exit.exits.across import AcrossExits
from ssl_exit.exits.final import Final, FinalClasses, FinalClusters
from ssl_exit.exits.rules import ExitRule, Training
from ssl_exit.exits.statistics import ClusterStatistics
from ssl_exit.memory import kept_memory

SAMPLE = 10_000
SAMPLE_BYTES = 1 << 29
CHUNK = 4096  # images counted at a time


@dataclass(frozen=True)
class Collected:
    """What one pass over the images leaves: all that rules are fitted from.

    Attributes:
        final: what gives the whole encoder's label.
        statistics: of all images; one for all exits where descriptors accumulate, otherwise one an exit.
        descriptors: of the sample, those of all exits side by side, (m, dim).
        labels: what exits learn of the sample, (m,) int64.
        soft: the whole encoder's soft assignment of the sample, (m, K), or (m, 0) if no rule needs it.
        skipped: position and reason of images that could not be used.
        n_clustered: images that k-means saw.
    """

    final: Final
    statistics: list[ClusterStatistics]
    descriptors: Tensor
    labels: Tensor
    soft: Tensor
    skipped: dict[int, str]
    n_clustered: int

    @property
    def n_fit(self) -> int:
        """Images behind the statistics."""
        return int(self.statistics[0].counts.sum())

    def at(self, tapped: TappedEncoder, kept: Sequence[int]) -> "Collected":
        """The same for some of the exits of `tapped` only."""
        ends = [part.stop for part in tapped.columns]
        columns = torch.cat([torch.arange(ends[i] - tapped.descriptors[i].dim, ends[i]) for i in kept])
        whole = self.statistics
        statistics = [whole[0].at(columns)] if tapped.accumulate else [whole[i] for i in kept]
        return replace(self, statistics=statistics, descriptors=self.descriptors[:, columns])

    def fit(self, tapped: TappedEncoder, rules: Sequence[ExitRule], across: AcrossExits, seed: int) -> Cascade:
        """A cascade whose thresholds let nothing exit yet; `rules` are fitted, one an exit of `tapped`."""
        trainings = []
        for i, (dim, columns) in enumerate(zip(tapped.seen, tapped.columns, strict=True)):
            seen = self.statistics[0].leading(dim) if tapped.accumulate else self.statistics[i]
            trainings.append(Training(seen, self.descriptors[:, columns], self.labels, self.soft, seed))
        type(rules[0]).fit_all(rules, trainings, exit_costs(tapped, rules, self.final))
        return Cascade(tapped, rules, self.final, across).to(tapped.device)


def first_images(source: ImageSource, order: np.ndarray, batch_size: int) -> Tensor:
    """The first batch with a usable image, (N, C, H, W).

    Raises:
        InputError: there is none.
    """
    reason = "there are none"
    for batch in source.batches(order, batch_size):
        if len(batch.indices):
            return batch.images.cpu()
        reason = next(iter(batch.skipped.values()))
    raise InputError(f"none of the {len(order)} images to fit on can be read; for example: {reason}")


@kept_memory()
def collect(
    tapped: TappedEncoder,
    passes: Sequence[Iterable[Batch]],
    n: int,
    *,
    n_clusters: int,
    spherical: bool,
    seed: int,
    scatter: bool = True,
    soft: bool = True,
    sample_images: int = SAMPLE,
    supervised: bool = False,
    classes: np.ndarray | None = None,
) -> Collected:
    """Find final clusters from a sample of the images, and collect what rules need from all of them.

    Args:
        tapped: the encoder, on the device to use.
        passes: images in random order; further passes are other views of them, which k-means does not see.
        n: how many images a pass has at most.
        n_clusters: K.
        spherical: compare final features by direction.
        seed: of k-means.
        scatter: whether a rule needs the scatter of the descriptors.
        soft: whether a rule needs the soft assignments of the sample.
        sample_images: how many images of each pass the sample should have; as many as k-means sees at least.
        supervised: final features are one logit a class, and there is nothing to cluster.
        classes: in the supervised mode, the class of the image at every position, which exits learn; without it
            they learn the whole encoder's answers.

    Raises:
        InputError: fewer usable images than clusters, or, in the supervised mode, another number of logits.
    """
    clustered = max(SAMPLE, 256 * n_clusters)
    sample = _Sample(tapped.dim, n, len(passes), max(clustered, sample_images), n_clusters)
    parts = [slice(None)] if tapped.accumulate else tapped.columns
    statistics: list[ClusterStatistics] = []
    final: Final | None = None
    n_clustered = 0

    def labels_of(final: Final, features: Tensor, positions: Tensor) -> Tensor:
        return final(features) if classes is None else torch.from_numpy(classes)[positions]

    def count(descriptors: Tensor, labels: Tensor) -> None:
        for part, into in zip(parts, statistics, strict=True):
            into.add(descriptors[:, part], labels)

    def begin() -> Final:
        nonlocal n_clustered
        if supervised:
            found: Final = FinalClasses.of(sample.features, n_clusters)
        else:
            n_clustered = min(len(sample.features), clustered)
            found = FinalClusters.fit(sample.features[:clustered], n_clusters, spherical=spherical, seed=seed)
        origin = sample.descriptors.double().mean(0)
        statistics.extend(ClusterStatistics.empty(n_clusters, origin[part], scatter=scatter) for part in parts)
        labels = labels_of(found, sample.features, sample.positions)
        for rows in torch.arange(len(labels)).split(CHUNK):
            count(sample.descriptors[rows], labels[rows])
        return found

    skipped: dict[int, str] = {}
    for batches in passes:
        sample.open_share()
        for descriptors, features, positions in _described(tapped, batches, skipped):
            taken = sample.add(descriptors, features, positions)
            rest = slice(0 if final else taken, None)  # begin() counts what the sample holds so far
            if final is None and sample.full:
                final = begin()
            if final is not None and len(descriptors[rest]):
                count(descriptors[rest], labels_of(final, features[rest], positions[rest]))
        if sample.filled == 0:
            raise InputError("no image has finite pixels and features: the encoder or the images are broken")
        final = final or begin()  # fewer usable images than the sample has room for
    assert final is not None
    labels = labels_of(final, sample.features, sample.positions)
    assigned = final.soft(sample.features) if soft else sample.features.new_empty(len(labels), 0)
    return Collected(final, statistics, sample.descriptors, labels, assigned, skipped, n_clustered)


class _Sample:
    """The first images of every pass in random order, in arrays allocated once; each pass has an equal share."""

    def __init__(self, dim: int, n: int, passes: int, wanted: int, least: int) -> None:
        self.share = min(n, wanted, max(least, SAMPLE_BYTES // (4 * dim * passes)))
        self.filled = self.room = 0
        self._descriptors = torch.empty(passes * self.share, dim)
        self._positions = torch.empty(passes * self.share, dtype=torch.int64)
        self._features = torch.empty(0, 0)

    def open_share(self) -> None:
        """Make room for the images of another pass."""
        self.room = self.filled + self.share

    def add(self, descriptors: Tensor, features: Tensor, positions: Tensor) -> int:
        """Take in as many rows as there is room for; returns how many."""
        if self.filled == 0:
            self._features = torch.empty(len(self._descriptors), features.shape[1])
        taken = min(len(descriptors), self.room - self.filled)
        rows = slice(self.filled, self.filled + taken)
        self._descriptors[rows], self._features[rows] = descriptors[:taken], features[:taken]
        self._positions[rows] = positions[:taken]
        self.filled += taken
        return taken

    @property
    def full(self) -> bool:
        return self.filled == self.room

    @property
    def descriptors(self) -> Tensor:
        return self._descriptors[: self.filled]

    @property
    def positions(self) -> Tensor:
        return self._positions[: self.filled]

    @property
    def features(self) -> Tensor:
        return self._features[: self.filled]


def _described(
    tapped: TappedEncoder, batches: Iterable[Batch], skipped: dict[int, str]
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Descriptors, final features and positions, batch by batch; images that are not finite are noted and left out."""
    for batch in on_device(batches, tapped.device):
        skipped.update(batch.skipped)
        if len(batch.indices) == 0:
            continue
        finite = finite_images(batch.images).cpu()
        with torch.inference_mode():
            descriptors, features = (t.cpu() for t in tapped(tapped.enter(batch.images)))
        good = descriptors.isfinite().all(1) & features.isfinite().all(1) & finite
        skipped.update(dict.fromkeys(batch.indices[~good].tolist(), NOT_FINITE))
        yield descriptors[good], features[good], batch.indices.cpu()[good]
