"""Statistics of descriptors by final cluster: all that closed-form rules are fitted to, by addition."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from ssl_exit.cascade.cascade import Cascade, describe, exit_costs
from ssl_exit.data.hashes import noted
from ssl_exit.data.images import Batch
from ssl_exit.encoders.tapped import TappedEncoder
from ssl_exit.exits.across import AcrossExits
from ssl_exit.exits.final import Final
from ssl_exit.exits.rules import ExitRule, FitData
from ssl_exit.exits.statistics import ClusterStatistics
from ssl_exit.fitting.sample import Clustering, Sample, fill, finite_descriptors, inertia_of, sample_size

CHUNK = 4096  # images counted at a time


@dataclass(frozen=True)
class Statistics:
    """Of images, by the label that exits learn; those of shards add up.

    Attributes:
        exits: one for all exits where descriptors accumulate, otherwise one an exit.
        images: content hashes of the images, (n,) uint64.
        skipped: position and reason of images that could not be used.
    """

    exits: list[ClusterStatistics]
    images: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))
    skipped: dict[int, str] = field(default_factory=dict)

    @classmethod
    def empty(cls, tapped: TappedEncoder, n_clusters: int, origin: Tensor, *, scatter: bool = True) -> "Statistics":
        """Of no images; about an origin, (dim,), near the mean descriptor."""
        parts = [slice(None)] if tapped.accumulate else tapped.columns
        return cls([ClusterStatistics.empty(n_clusters, origin[part], scatter=scatter) for part in parts])

    def add(self, tapped: TappedEncoder, descriptors: Tensor, labels: Tensor) -> None:
        """Count images in: descriptors of all exits, (N, dim), and labels, (N,) int64."""
        parts = [slice(None)] if tapped.accumulate else tapped.columns
        for part, one in zip(parts, self.exits, strict=True):
            one.add(descriptors[:, part], labels)

    def __add__(self, other: "Statistics") -> "Statistics":
        exits = [a + b for a, b in zip(self.exits, other.exits, strict=True)]
        return Statistics(exits, np.union1d(self.images, other.images), self.skipped | other.skipped)


def count(
    tapped: TappedEncoder,
    batches: Iterable[Batch],
    final: Final,
    origin: Tensor,
    *,
    scatter: bool = True,
) -> Statistics:
    """Statistics of one shard of the images by their final cluster.

    Args:
        tapped: the encoder, on the device to use.
        batches: images of the shard.
        final: the final clusters, the same for all shards.
        origin: near the mean descriptor, (dim,), such as `Sample.origin`: what statistics are taken about.
        scatter: whether a rule needs the scatter of the descriptors.
    """
    skipped: dict[int, str] = {}
    hashes: list[np.ndarray] = []
    result = Statistics.empty(tapped, final.n_clusters, origin, scatter=scatter)
    for each in finite_descriptors(describe(tapped, noted(batches, hashes)), skipped):
        if len(each.indices):
            result.add(tapped, each.descriptors, final(each.features))
    return replace(result, images=np.unique(np.concatenate([np.empty(0, np.uint64), *hashes])), skipped=skipped)


@dataclass(frozen=True)
class Collected:
    """All that rules are fitted to.

    Attributes:
        final: what gives the full encoder's label.
        statistics: of all images.
        descriptors: of the sample, those of all exits side by side, (m, dim).
        labels: what exits learn of the sample, (m,) int64.
        soft: the full encoder's soft assignment of the sample, (m, K), or (m, 0) if no rule needs it.
        n_clustered: images that k-means saw.
        inertia: sum of their squared distances to the nearest centroid; NaN without k-means.
    """

    final: Final
    statistics: Statistics
    descriptors: Tensor
    labels: Tensor
    soft: Tensor
    n_clustered: int = 0
    inertia: float = float("nan")

    @property
    def n_fit(self) -> int:
        """Images behind the statistics."""
        return int(self.statistics.exits[0].counts.sum())

    def at(self, tapped: TappedEncoder, kept: Sequence[int]) -> "Collected":
        """The same for some of the exits of `tapped` only."""
        ends = [part.stop for part in tapped.columns]
        columns = torch.cat([torch.arange(ends[i] - tapped.descriptors[i].dim, ends[i]) for i in kept])
        every = self.statistics.exits
        exits = [every[0].at(columns)] if tapped.accumulate else [every[i] for i in kept]
        return replace(self, statistics=replace(self.statistics, exits=exits), descriptors=self.descriptors[:, columns])

    def fit(self, tapped: TappedEncoder, rules: Sequence[ExitRule], across: AcrossExits, seed: int) -> Cascade:
        """A cascade whose thresholds let nothing exit yet; `rules`, one an exit of `tapped`, are fitted, except for
        fronts, which were taught."""
        data, taught = [], len(tapped.fronts)
        for i, (dim, columns) in enumerate(zip(tapped.seen, tapped.columns, strict=True)):
            every = self.statistics.exits
            seen = every[0].leading(dim) if tapped.accumulate else every[i]
            data.append(FitData(seen, self.descriptors[:, columns], self.labels, self.soft, seed))
        learning, costs = rules[taught:], exit_costs(tapped, rules, self.final)[taught:]
        if learning:
            type(learning[0]).fit_all(learning, data[taught:], costs)
        return Cascade.closed(tapped, rules, self.final, across)


def collected(
    final: Final, statistics: Statistics, sample: Sample, labels: Tensor | None = None, *, soft: bool = True
) -> Collected:
    """From merged statistics and a merged sample, all that rules are fitted to.

    Args:
        final: what gives the full encoder's label.
        statistics: of all images.
        sample: of them.
        labels: what exits learn of the sample, (m,) int64; None: the full encoder's answers.
        soft: whether a rule needs soft assignments.
    """
    own = final(sample.features) if labels is None else labels
    assigned = final.soft(sample.features) if soft else sample.features.new_empty(len(own), 0)
    return Collected(final, statistics, sample.descriptors, own, assigned)


def collect(
    tapped: TappedEncoder,
    passes: Sequence[Iterable[Batch]],
    n: int,
    rules: Sequence[ExitRule],
    clustering: Clustering,
    classes: np.ndarray | None = None,
) -> Collected:
    """Find final clusters from the first images, and collect what rules need from all of them in one pass.

    Held in memory, beside one batch: descriptors and final features of the sample, and the statistics, of which the
    scatter of the descriptors, dim x dim, is the largest.

    Args:
        tapped: the encoder, on the device to use.
        passes: images in random order; further passes are other views of them, which k-means does not see.
        n: images of a pass at most.
        rules: to be fitted; they say what is needed.
        clustering: how the final clusters come about.
        classes: in the supervised mode, the class of the image at every position, which exits learn; without it
            they learn the full encoder's answers.

    Raises:
        InputError: fewer usable images than clusters, or, in the supervised mode, another number of logits.
    """
    share = sample_size(n, len(passes), clustering, max(rule.sample_images for rule in rules), tapped.dim)
    room = Sample.empty(len(passes) * share, tapped)
    skipped: dict[int, str] = {}
    n_sample = n_clustered = 0
    inertia = float("nan")
    final: Final | None = None
    statistics: Statistics | None = None

    def labels_of(final: Final, features: Tensor, indices: Tensor) -> Tensor:
        return final(features) if classes is None else torch.from_numpy(classes)[indices]

    for batches in passes:
        stream = finite_descriptors(describe(tapped, batches), skipped)
        filled, others = fill(room.at(slice(n_sample, n_sample + share)), stream)
        own = room.at(slice(n_sample, n_sample + filled))
        n_sample += filled
        if statistics is None:
            final, n_clustered = clustering.of(own)
            inertia = inertia_of(final, own.features[:n_clustered])
            scatter = any(rule.needs_scatter for rule in rules)
            statistics = Statistics.empty(tapped, final.n_clusters, own.origin, scatter=scatter)
        assert final is not None
        labels = labels_of(final, own.features, own.indices)
        for rows in torch.arange(filled).split(CHUNK):
            statistics.add(tapped, own.descriptors[rows], labels[rows])
        for each in others:
            if len(each.indices):
                statistics.add(tapped, each.descriptors, labels_of(final, each.features, each.indices))
    assert final is not None
    assert statistics is not None
    kept = room.at(slice(n_sample))
    labels = labels_of(final, kept.features, kept.indices)
    result = collected(
        final, replace(statistics, skipped=skipped), kept, labels, soft=any(rule.needs_soft for rule in rules)
    )
    return replace(result, n_clustered=n_clustered, inertia=inertia)
