"""Fronts in a fit: what the full encoder says of every image, the size of a front, and teaching it."""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_exit.cascade.cascade import describe
from ssl_exit.cascade.times import now
from ssl_exit.data.hashes import image_hashes, images_hash, module_hash
from ssl_exit.data.images import Batch
from ssl_exit.data.kept import Kept
from ssl_exit.encoders.front import Front, widest_front
from ssl_exit.encoders.tapped import TappedEncoder
from ssl_exit.errors import InputError
from ssl_exit.exits.final import Final
from ssl_exit.exits.front import FrontRule
from ssl_exit.fitting.sample import Sample, clustered_images, final_clusters
from ssl_exit.model import Teaching
from ssl_exit.settings import Clusters, Settings

CHUNK = 65_536  # rows of soft assignments sharpened at a time
TIMED = 5  # runs, of which the fastest counts


@dataclass(frozen=True)
class Assigned:
    """What the full encoder says of the images that a front is taught.

    Attributes:
        final: what gives its label.
        soft: its soft assignments, where wanted the mean over the image and its mirror image, (N, K) float16; rows of
            other images are 0.
        labels: (N,) int64; -1 for other images.
        images: content hashes, (n,) uint64.
        skipped: position and reason of images that could not be used.
        n_clustered: images that k-means saw.
        seconds: of the pass.
    """

    final: Final
    soft: Tensor
    labels: Tensor
    images: np.ndarray
    skipped: dict[int, str]
    n_clustered: int
    seconds: float

    @property
    def positions(self) -> np.ndarray:
        """Of the images, (n,) int64."""
        return np.flatnonzero(self.labels.numpy() >= 0)


def assign(
    tapped: TappedEncoder,
    batches: Iterable[Batch],
    n: int,
    *,
    n_clusters: int,
    clusters: Clusters,
    seed: int,
    mirror: bool = True,
    keep: Kept | None = None,
) -> Assigned:
    """Find final clusters from the first images, and the full encoder's soft assignment of all, in one pass.

    Args:
        tapped: the encoder, on the device to use; its exits are not asked.
        batches: images in random order.
        n: positions there are in the data.
        n_clusters: K.
        clusters: what the full encoder answers.
        seed: of k-means.
        mirror: average over the image and its mirror image.
        keep: where to keep images for teaching.

    Raises:
        InputError: fewer usable images than clusters, or, in the supervised mode, another number of logits.
    """
    begun, wanted = time.perf_counter(), clustered_images(n_clusters)
    skipped: dict[int, str] = {}
    hashes: list[np.ndarray] = [np.empty(0, np.uint64)]
    stream = _features(tapped, batches, mirror, skipped, hashes, keep)
    first: list[tuple[Tensor, Tensor]] = []
    for each in stream:
        first.append(each)
        if sum(len(indices) for indices, _ in first) >= wanted:
            break
    features = torch.cat([torch.empty(0, tapped.output.dim), *(features[:, 0] for _, features in first)])
    sample = Sample(np.zeros(len(features), np.uint64), torch.arange(len(features)), features[:, :0], features)
    final = final_clusters(sample, n_clusters, clusters, seed)
    soft = torch.zeros(n, n_clusters, dtype=torch.float16)
    labels = torch.full((n,), -1)
    for indices, features in chain(first, stream):
        labels[indices] = final(features[:, 0])
        soft[indices] = final.soft(features.flatten(0, 1)).view(*features.shape[:2], -1).mean(1).half()
    n_clustered = 0 if clusters.supervised else min(len(sample), wanted)
    seconds = time.perf_counter() - begun
    return Assigned(final, soft, labels, np.unique(np.concatenate(hashes)), skipped, n_clustered, seconds)


def _features(
    tapped: TappedEncoder,
    batches: Iterable[Batch],
    mirror: bool,
    skipped: dict[int, str],
    hashes: list[np.ndarray],
    keep: Kept | None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Positions, (N,), and final features of images and, where wanted, of the same mirrored, (N, 1 or 2, F)."""
    for batch in batches:
        if len(batch.indices):
            hashes.append(image_hashes(batch.images))
        if keep is not None:
            keep.add(batch)
        flipped = [batch.images.flip(-1)] if mirror and len(batch.indices) else []  # before an encoder changes them
        (one,) = describe(tapped, [batch])
        skipped |= one.skipped
        rows = torch.isin(batch.indices, one.indices)
        ways = [one.features.cpu()]
        with torch.inference_mode():
            ways += [tapped.final_features(tapped.enter(images[rows])).cpu() for images in flipped]
        if len(one.indices):  # where the mirrored image fails, the image stands for it
            yield (
                one.indices,
                torch.stack([torch.where(way.isfinite().all(1)[:, None], way, ways[0]) for way in ways], 1),
            )


def sized_fronts(tapped: TappedEncoder, example: Tensor, settings: Settings) -> list[Front]:
    """Untaught fronts: the user's own, or as wide as the budgets of multiply-adds and time allow.

    Args:
        tapped: the encoder, on the device to use.
        example: one batch of images, (N, C, H, W).
        settings: of the front, seed and precision.
    """
    how, shape = settings.front, tuple(example.shape[1:])
    if how.kind == "module":
        if not isinstance(how.network, nn.Module):
            raise InputError("a front of your own is a torch.nn.Module: ExitClusterer(encoder, front=that module)")
        return [Front(how.network, shape, how.side)]
    encoder_macs = sum(tapped.staged.macs)
    encoder_seconds = _seconds(lambda: tapped.final_features(tapped.enter(example)), tapped.device)

    def affordable(front: Front) -> bool:
        runs = front.for_inference(settings.runtime.precision).to(tapped.device)
        seconds = _seconds(lambda: runs(tapped.enter(example)), tapped.device)
        return seconds <= how.time / len(how.shares) * encoder_seconds

    fronts = []
    for share in how.shares:
        macs = share * encoder_macs if encoder_macs else float("inf")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.random_state)
            fronts.append(widest_front(shape, how.side, how.depth, macs, how.width, affordable))
    return fronts


@torch.inference_mode()
def _seconds(call: Any, device: torch.device) -> float:
    """The fastest of several runs, after one to warm up."""
    call()
    runs = []
    for _ in range(TIMED):
        start = now(device)
        call()
        runs.append(now(device) - start)
    return min(runs)


@dataclass(frozen=True)
class TaughtFronts:
    """Fronts in a row, their heads, how teaching them went, and what they were taught."""

    fronts: tuple[Front, ...] = ()
    rules: tuple[FrontRule, ...] = ()
    teaching: tuple[Teaching, ...] = ()
    assigned: Assigned | None = None


def teach_fronts(
    tapped: TappedEncoder,
    batches: Iterable[Batch],
    kept: Kept,
    example: Tensor,
    settings: Settings,
    classes: np.ndarray | None = None,
) -> TaughtFronts:
    """Size fronts, find the final clusters, and teach the fronts one after another; a later one's head sees the
    features of those before it.

    Args:
        tapped: the encoder, on the device to use.
        batches: images in random order.
        kept: keeps them for teaching.
        example: one batch of images, (N, C, H, W).
        settings: all parameters.
        classes: in the supervised mode, the class of every image, (N,), which is taught instead, or None.
    """
    from ssl_exit.training.front import sharpened, teach

    how = settings.front
    untaught = sized_fronts(tapped, example, settings)
    assigned = assign(
        tapped,
        batches,
        len(kept.source),
        n_clusters=settings.n_clusters,
        clusters=settings.clusters,
        seed=settings.random_state,
        mirror=how.mirror,
        keep=kept,
    )
    if classes is None:
        few = assigned.soft.split(CHUNK)  # in float32 all at once would take as much again
        targets = torch.cat([sharpened(rows.float(), how.sharpness).half() for rows in few])
    else:
        targets = F.one_hot(torch.from_numpy(classes), settings.n_clusters).half()
    images, result = kept.open(), TaughtFronts(assigned=assigned)
    about = {"taught images": images_hash(assigned.images), "encoder": module_hash(tapped.staged)}
    for i, front in enumerate(untaught, start=1):
        taught = teach(
            front,
            result.fronts if settings.exits.accumulate else (),
            images,
            assigned.positions,
            targets,
            assigned.labels,
            replace(how, seconds=None if how.seconds is None else how.seconds / len(untaught)),
            max_disagreement=settings.max_disagreement,
            seed=settings.random_state,
            device=settings.device.partition(":")[0],
            about=about,
            folder=Path(how.folder) / f"front{i}" if how.folder else None,
            progress=settings.runtime.progress,
        )
        spent = taught.seconds + (assigned.seconds if i == 1 else 0.0)
        result = TaughtFronts(
            (*result.fronts, taught.front),
            (*result.rules, taught.rule),
            (*result.teaching, Teaching(spent, taught.epochs, taught.agreement, taught.saving)),
            assigned,
        )
    return result
