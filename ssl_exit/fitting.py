"""One pass over the images: a sample for k-means first, then statistics as they stream by.

What is held in memory, beside one batch: the descriptors and final features of a random sample (10,000 images,
or 256 a cluster if that is more, up to 512 MB of descriptors), on which k-means runs and from which some rules
are made; and the statistics, of which the scatter of the descriptors, D x D, is the largest.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ssl_exit.cascade import NOT_FINITE, Cascade, finite_images
from ssl_exit.data.images import Batch, ImageSource
from ssl_exit.encoders.tapped import TappedEncoder
from ssl_exit.errors import InputError
from ssl_exit.exits.kmeans import FinalClusters
from ssl_exit.exits.rules import ExitRule
from ssl_exit.exits.statistics import ClusterStatistics

SAMPLE = 10_000
SAMPLE_BYTES = 1 << 29


@dataclass(frozen=True)
class Fitted:
    """A cascade whose thresholds let nothing exit yet, and what it was made from.

    Attributes:
        cascade: stages, rules and final clusters.
        skipped: position and reason of images that could not be used.
        n_fit: images behind the statistics.
        n_sample: of those, images that k-means saw.
    """

    cascade: Cascade
    skipped: dict[int, str]
    n_fit: int
    n_sample: int


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


def fit_cascade(
    tapped: TappedEncoder,
    batches: Iterable[Batch],
    n: int,
    *,
    rule: type[ExitRule],
    n_clusters: int,
    spherical: bool,
    seed: int,
) -> Fitted:
    """Final clusters from a sample of the images, and a rule at every exit from all of them.

    Args:
        tapped: the encoder, on the device to use.
        batches: images in random order.
        n: how many there are at most.
        rule: class of the rules.
        n_clusters: K.
        spherical: compare final features by direction.
        seed: of k-means.

    Raises:
        InputError: fewer usable images than clusters.
    """
    sample = _Sample(tapped.dim, n, n_clusters)
    final: FinalClusters | None = None
    parts = [slice(None)] if tapped.accumulate else tapped.columns
    statistics: list[ClusterStatistics] = []

    def cluster() -> FinalClusters:
        found = FinalClusters.fit(sample.features, n_clusters, spherical=spherical, seed=seed)
        origin = sample.descriptors.double().mean(0)
        for part in parts:
            statistics.append(ClusterStatistics.empty(n_clusters, origin[part], scatter=rule.needs_scatter))
        count(sample.descriptors, found(sample.features))
        return found

    def count(descriptors: Tensor, labels: Tensor) -> None:
        for part, into in zip(parts, statistics, strict=True):
            into.add(descriptors[:, part], labels)

    skipped: dict[int, str] = {}
    for descriptors, features in _described(tapped, batches, skipped):
        taken = sample.add(descriptors, features)
        if final is None and sample.full:
            final = cluster()
        if final is not None and taken < len(descriptors):
            count(descriptors[taken:], final(features[taken:]))
    if final is None and sample.filled == 0:
        raise InputError("no image has finite pixels and features: the encoder or the images are broken")
    if final is None:  # fewer usable images than the sample has room for
        final = cluster()

    labels = final(sample.features)
    rules = []
    for i, (dim, columns) in enumerate(zip(tapped.seen, tapped.columns, strict=True)):
        rules.append(rule(dim, n_clusters))
        seen = statistics[0].leading(dim) if tapped.accumulate else statistics[i]
        rules[-1].fit(seen, sample.descriptors[:, columns], labels, seed)
    device = next(tapped.parameters()).device
    cascade = Cascade(tapped, rules, final).to(device)
    return Fitted(cascade, skipped, int(statistics[0].counts.sum()), len(labels))


class _Sample:
    """The first images of a random order, in arrays allocated once."""

    def __init__(self, dim: int, n: int, n_clusters: int) -> None:
        self.room = min(n, max(SAMPLE, 256 * n_clusters), max(n_clusters, SAMPLE_BYTES // (4 * dim)))
        self.filled = 0
        self._descriptors = torch.empty(self.room, dim)
        self._features = torch.empty(self.room, 0)

    def add(self, descriptors: Tensor, features: Tensor) -> int:
        """Take in as many rows as there is room for; returns how many."""
        if self.filled == 0:
            self._features = torch.empty(self.room, features.shape[1])
        taken = min(len(descriptors), self.room - self.filled)
        rows = slice(self.filled, self.filled + taken)
        self._descriptors[rows], self._features[rows] = descriptors[:taken], features[:taken]
        self.filled += taken
        return taken

    @property
    def full(self) -> bool:
        return self.filled == self.room

    @property
    def descriptors(self) -> Tensor:
        return self._descriptors[: self.filled]

    @property
    def features(self) -> Tensor:
        return self._features[: self.filled]


def _described(
    tapped: TappedEncoder, batches: Iterable[Batch], skipped: dict[int, str]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Descriptors and final features, batch by batch; images that are not finite are noted and left out."""
    device = next(tapped.parameters()).device
    for batch in batches:
        skipped.update(batch.skipped)
        if len(batch.indices) == 0:
            continue
        with torch.inference_mode():
            descriptors, features = (t.cpu() for t in tapped(batch.images.to(device)))
        good = descriptors.isfinite().all(1) & features.isfinite().all(1) & finite_images(batch.images).cpu()
        skipped.update(dict.fromkeys(batch.indices[~good].tolist(), NOT_FINITE))
        yield descriptors[good], features[good]
