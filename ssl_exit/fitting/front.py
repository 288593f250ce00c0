"""Fronts in a fit: what the full encoder says of every image, the size of a front, and teaching it."""

import copy
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ssl_exit.cascade.cascade import describe
from ssl_exit.cascade.times import now
from ssl_exit.data.cache import CachedImages
from ssl_exit.data.hashes import images_hash, module_hash, noted, settings_hash
from ssl_exit.data.images import Batch
from ssl_exit.encoders.front import FrontDescriptor, widest_front
from ssl_exit.encoders.tapped import TappedEncoder
from ssl_exit.errors import InputError
from ssl_exit.exits.final import Final
from ssl_exit.exits.front import FrontRule
from ssl_exit.fitting.sample import Clustering, Sample, inertia_of
from ssl_exit.provenance import Teaching
from ssl_exit.settings import Front, Settings

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
        sample: final features that set the scale of soft assignments, (m, F).
        images: content hashes, (n,) uint64.
        skipped: position and reason of images that could not be used.
        n_clustered: images that k-means saw.
        inertia: sum of their squared distances to the nearest centroid; NaN without k-means.
        seconds: of the pass.
    """

    final: Final
    soft: Tensor
    labels: Tensor
    sample: Tensor
    images: np.ndarray
    skipped: dict[int, str]
    n_clustered: int
    inertia: float
    seconds: float

    @property
    def positions(self) -> np.ndarray:
        """Of the images, (n,) int64."""
        return np.flatnonzero(self.labels.numpy() >= 0)

    def answers(self, tapped: TappedEncoder) -> Callable[[Tensor], Tensor]:
        """The encoder's soft assignment of any images, (N, C, H, W) -> (N, K), on its device."""
        final, sample = copy.deepcopy(self.final).to(tapped.device), self.sample.to(tapped.device)
        return lambda images: final.soft(tapped.final_features(tapped.enter(images)).float(), sample)


def assign(
    tapped: TappedEncoder,
    batches: Iterable[Batch],
    n: int,
    clustering: Clustering,
    mirror: bool = True,
) -> Assigned:
    """The full encoder's soft assignment of all images in one pass; final clusters are found from the first ones.

    Args:
        tapped: the encoder, on the device to use; its exits are not asked.
        batches: images in random order.
        n: positions there are in the data.
        clustering: how the final clusters come about; known already where shards share them.
        mirror: average over the image and its mirror image.

    Raises:
        InputError: fewer usable images than clusters, or, in the supervised mode, another number of logits.
    """
    begun = time.perf_counter()
    skipped: dict[int, str] = {}
    hashes: list[np.ndarray] = [np.empty(0, np.uint64)]
    stream = _features(tapped, noted(batches, hashes), mirror, skipped)
    first: list[tuple[Tensor, Tensor]] = []
    for each in stream:
        first.append(each)
        if sum(len(indices) for indices, _ in first) >= clustering.wanted:
            break
    features = torch.cat([torch.empty(0, tapped.output.dim), *(features[:, 0] for _, features in first)])
    positions = torch.cat([torch.empty(0, dtype=torch.int64), *(indices for indices, _ in first)])
    final, n_clustered = clustering.of(Sample(np.zeros(len(features), np.uint64), positions, features[:, :0], features))
    soft = torch.zeros(n, final.n_clusters, dtype=torch.float16)
    labels = torch.full((n,), -1)
    for indices, seen in chain(first, stream):
        labels[indices] = final(seen[:, 0])
        each_way = final.soft(seen.flatten(0, 1), features).view(*seen.shape[:2], -1)
        soft[indices] = each_way.mean(1).half()
    used = np.unique(np.concatenate(hashes)), skipped, n_clustered, inertia_of(final, features[:n_clustered])
    return Assigned(final, soft, labels, features, *used, time.perf_counter() - begun)


def _features(
    tapped: TappedEncoder, batches: Iterable[Batch], mirror: bool, skipped: dict[int, str]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Positions, (N,), and final features of images and, where wanted, of the same mirrored, (N, 1 or 2, F)."""
    for batch in batches:
        flipped = [batch.images.flip(-1)] if mirror and len(batch.indices) else []  # before an encoder changes them
        (one,) = describe(tapped, [batch])
        skipped |= one.skipped
        rows = torch.isin(batch.indices, one.indices)
        ways = [one.features.cpu()]
        with torch.inference_mode():
            ways += [tapped.final_features(tapped.enter(images[rows])).cpu() for images in flipped]
        if len(one.indices):  # where the mirrored image fails, the image stands for it
            usable = [torch.where(way.isfinite().all(1)[:, None], way, ways[0]) for way in ways]
            yield one.indices, torch.stack(usable, dim=1)


def sized_fronts(tapped: TappedEncoder, example: Tensor, settings: Settings) -> list[FrontDescriptor]:
    """Untaught fronts: the user's own, as checkpoints have them, or as wide as multiply-adds and time allow.

    Args:
        tapped: the encoder, on the device to use.
        example: one batch of images, (N, C, H, W).
        settings: of the front, seed and precision.
    """
    how, shape = settings.front, tuple(example.shape[1:])
    if how.kind == "module":
        if not isinstance(how.network, nn.Module):
            raise InputError("a front of your own is a torch.nn.Module: ExitClusterer(encoder, front=that module)")
        return [FrontDescriptor(copy.deepcopy(how.network).cpu(), shape, how.side)]
    encoder_macs = sum(tapped.staged.macs)
    full = 0.0 if how.width else _seconds(lambda: tapped.final_features(tapped.enter(example)), tapped.device)

    def affordable(front: FrontDescriptor) -> bool:
        runs = front.for_inference(settings.runtime.precision).to(tapped.device)
        seconds = _seconds(lambda: runs(tapped.enter(example)), tapped.device)
        return seconds <= how.time / len(how.shares) * full

    fronts = []
    for i, share in enumerate(how.shares, start=1):
        begun = _begun(how, i)
        if begun is not None:  # its size may depend on times measured then
            fronts.append(FrontDescriptor.from_config(begun))
            continue
        macs = share * encoder_macs if encoder_macs else float("inf")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.random_state)
            fronts.append(widest_front(shape, how.side, how.depth, macs, how.width, affordable))
    return fronts


def _folder(how: Front, i: int) -> Path | None:
    return Path(how.folder) / f"front{i}" if how.folder else None


def _begun(how: Front, i: int) -> dict[str, Any] | None:
    """The configuration of the i-th front in its checkpoints, if there are any."""
    folder = _folder(how, i)
    if folder is None or not folder.is_dir():
        return None
    from ssl_exit.training.run import saved_settings

    return saved_settings(folder).get("front")


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

    fronts: tuple[FrontDescriptor, ...] = ()
    rules: tuple[FrontRule, ...] = ()
    teaching: tuple[Teaching, ...] = ()
    assigned: Assigned | None = None


def teach_fronts(
    untaught: Sequence[FrontDescriptor],
    tapped: TappedEncoder,
    batches: Iterable[Batch],
    cache: CachedImages,
    settings: Settings,
    clustering: Clustering,
    classes: np.ndarray | None = None,
) -> TaughtFronts:
    """Find the final clusters, and teach fronts one after another; a later one's head sees the features of those before
    it where descriptors accumulate.

    Args:
        untaught: see `sized_fronts`.
        tapped: the encoder, on the device to use.
        batches: images in random order.
        cache: keeps them for teaching.
        settings: all parameters.
        clustering: how the final clusters come about.
        classes: in the supervised mode, the class of every image, (N,), which is taught instead, or None.
    """
    from ssl_exit.training.front import sharpened, teach

    how, n = settings.front, len(cache.source)
    assigned = assign(
        tapped, cache.add(batches), n, clustering, mirror=how.mirror and classes is None and not how.match
    )
    about: dict[str, Any] = {
        "images": images_hash(assigned.images),
        "encoder": module_hash(tapped.staged),
        "n_clusters": settings.n_clusters,
        "clusters": asdict(settings.clusters),
        "seed of clusters": settings.random_state,
    }
    if clustering.weights is not None:
        about["weights"] = settings_hash(clustering.weights.tolist())
    if classes is None:
        few = assigned.soft.split(CHUNK)  # in float32 all at once would take as much again
        targets = torch.cat([sharpened(rows.float(), how.sharpness).half() for rows in few])
    else:
        taught_classes = torch.from_numpy(classes)[:, None]
        targets = torch.zeros_like(assigned.soft).scatter_(1, taught_classes, 1)
        about["classes"] = images_hash(classes.astype(np.uint64) + np.arange(n, dtype=np.uint64) * settings.k)
    images, result = cache.open(), TaughtFronts(assigned=assigned)
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
            about=about | {"front": front.config, "before": [one.config for one in result.fronts]},
            folder=_folder(how, i),
            answers=assigned.answers(tapped) if how.match else None,
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
