"""A random sample of the images: what k-means sees, and what rules that need single images are fitted to."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from ssl_exit.cascade.cascade import Described, describe
from ssl_exit.cascade.result import NOT_FINITE
from ssl_exit.data.hashes import image_hashes
from ssl_exit.data.images import Batch
from ssl_exit.encoders.tapped import TappedEncoder
from ssl_exit.errors import InputError
from ssl_exit.exits.final import Final, FinalClasses, FinalClusters
from ssl_exit.settings import Clusters

SAMPLE = 10_000  # images that k-means sees at least, where there are so many
PER_CLUSTER = 256  # images a cluster, where that is more
SAMPLE_BYTES = 1 << 29  # of descriptors


@dataclass(frozen=True)
class Sample:
    """Some of the images, described.

    Attributes:
        keys: random numbers that decide who is in it, the lowest first, (m,) uint64.
        indices: positions of the images, (m,) int64.
        descriptors: of all exits side by side, (m, dim).
        features: final features, (m, F).
    """

    keys: np.ndarray
    indices: Tensor
    descriptors: Tensor
    features: Tensor

    @classmethod
    def empty(cls, n: int, tapped: TappedEncoder) -> "Sample":
        """Room for n images, allocated once."""
        indices = torch.empty(n, dtype=torch.int64)
        return cls(np.zeros(n, np.uint64), indices, torch.empty(n, tapped.dim), torch.empty(n, tapped.output.dim))

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def origin(self) -> Tensor:
        """The mean descriptor, (dim,) float64."""
        return self.descriptors.double().mean(0)

    def at(self, rows: slice | np.ndarray) -> "Sample":
        """Some of its images."""
        return Sample(*(getattr(self, f.name)[rows] for f in fields(self)))

    def __add__(self, other: "Sample") -> "Sample":
        """Both, in the order of their keys; take `lowest(n)` of the sum."""
        keys = np.concatenate([self.keys, other.keys])
        joined = [torch.cat([getattr(s, f.name) for s in (self, other)]) for f in fields(self)[1:]]
        return Sample(keys, *joined).at(np.argsort(keys, kind="stable"))

    def lowest(self, n: int) -> "Sample":
        """The n images with the lowest keys."""
        return self.at(slice(n))


def sample(tapped: TappedEncoder, batches: Iterable[Batch], n: int) -> Sample:
    """The n images of lowest content hash: the same ones however images are divided among shards.

    Args:
        tapped: the encoder, on the device to use.
        batches: images.
        n: images wanted; fewer where there are no more.

    Returns:
        A sample. `(a + b).lowest(n)` is that of both shards.
    """
    result = Sample.empty(0, tapped)
    for batch in batches:
        hashes = image_hashes(batch.images) if len(batch.indices) else np.empty(0, np.uint64)
        result = (result + described_sample(tapped, batch, hashes, {})).lowest(n)
    return result


def described_sample(tapped: TappedEncoder, batch: Batch, hashes: np.ndarray, skipped: dict[int, str]) -> Sample:
    """All usable images of a batch by their content hashes, (N,) uint64; the others are added to `skipped`."""
    (described,) = finite_descriptors(describe(tapped, [batch]), skipped)
    kept = np.isin(batch.indices.numpy(), described.indices.numpy())
    return Sample(hashes[kept], described.indices, described.descriptors.cpu(), described.features.cpu())


@dataclass(frozen=True, eq=False)
class Clustering:
    """What becomes of a sample: the final clusters.

    Attributes:
        n_clusters: K.
        clusters: what the full encoder answers.
        seed: of k-means.
        weights: of the image at every position, for k-means, or None.
        final: final clusters that are known already, or None.
    """

    n_clusters: int
    clusters: Clusters = Clusters()
    seed: int = 0
    weights: np.ndarray | None = None
    final: Final | None = None

    @property
    def wanted(self) -> int:
        """Images that k-means sees at most."""
        return max(SAMPLE, PER_CLUSTER * self.n_clusters)

    def of(self, sample: Sample) -> tuple[Final, int]:
        """The final clusters, and the number of images that k-means saw."""
        if self.final is not None:
            return self.final, 0
        weights = None if self.weights is None else self.weights[sample.indices.numpy()]
        final = final_clusters(sample, self.n_clusters, self.clusters, self.seed, weights)
        asked = not self.clusters.supervised and self.clusters.centroids is None
        return final, min(len(sample), self.wanted) if asked else 0


def sample_size(n: int, passes: int, clustering: Clustering, wanted: int, dim: int) -> int:
    """Images of each pass in the sample of a fit: as many as k-means or a rule wants, as memory allows.

    Args:
        n: images there are.
        passes: over them.
        clustering: at least one image a cluster is needed.
        wanted: by the rule.
        dim: entries of all descriptors.
    """
    room = max(clustering.n_clusters, SAMPLE_BYTES // (4 * dim * passes))
    return min(n, max(clustering.wanted, wanted), room)


def final_clusters(
    sample: Sample, n_clusters: int, clusters: Clusters, seed: int, weights: np.ndarray | None = None
) -> Final:
    """The final clusters of a sample: k-means on its first images, centroids of the user's, or in the supervised mode
    the encoder's classes.

    Raises:
        InputError: fewer images than clusters, or another number of features than centroids or classes have.
    """
    if len(sample) == 0:
        raise InputError("no image has finite pixels and features: the encoder or the images are broken")
    if clusters.supervised:
        return FinalClasses.of(sample.features, n_clusters)
    if clusters.centroids is not None:
        return FinalClusters.given(torch.tensor(clusters.centroids), sample.features, spherical=clusters.spherical)
    few = slice(Clustering(n_clusters).wanted)
    weights = None if weights is None else weights[few]
    if weights is not None and not weights.any():
        raise InputError("sample_weight is 0 for all images that k-means sees: fit() holds the others out")
    return FinalClusters.fit(sample.features[few], n_clusters, spherical=clusters.spherical, seed=seed, weights=weights)


def inertia_of(final: Final, features: Tensor) -> float:
    """Sum of squared distances of final features, (N, F), to the nearest centroid; NaN without any."""
    if not isinstance(final, FinalClusters) or len(features) == 0:
        return float("nan")
    return float(final.squared_distances(features).min(1).values.double().sum())


def fill(into: Sample, stream: Iterator[Described]) -> tuple[int, Iterator[Described]]:
    """Copy the first images of a stream into a sample until it is full.

    Returns:
        How many it holds, and the stream of the other images.
    """
    filled = 0
    for each in stream:
        taken = min(len(each.indices), len(into) - filled)
        rows = slice(filled, filled + taken)
        into.indices[rows] = each.indices[:taken]
        into.descriptors[rows], into.features[rows] = each.descriptors[:taken], each.features[:taken]
        filled += taken
        if filled == len(into):
            others = Described(each.indices[taken:], each.descriptors[taken:], each.features[taken:], {})
            return filled, chain([others], stream)
    return filled, iter(())


def finite_descriptors(stream: Iterable[Described], skipped: dict[int, str]) -> Iterator[Described]:
    """Only images whose descriptors are finite, on the CPU: a statistic of any other would be NaN. All that are skipped
    are added to a dictionary."""
    for each in stream:
        skipped.update(each.skipped)
        descriptors, features = each.descriptors.cpu(), each.features.cpu()
        good = descriptors.isfinite().all(1)
        skipped.update(dict.fromkeys(each.indices[~good].tolist(), NOT_FINITE))
        yield Described(each.indices[good], descriptors[good], features[good], each.skipped)
