"""A fit of images that several processes, machines or jobs read: each sees its own shard, all come to one model.

An image is fitted to, shapes thresholds or certifies by its content hash, so that copies fall together wherever they
are. Final clusters come from the images of lowest hash, whichever shards have them. Nothing depends on how images are
divided among shards, but for rounding. Each shard reads its images two or three times.
"""

import copy
from collections.abc import Iterable
from dataclasses import replace
from functools import cache

import numpy as np
import torch
from torch import nn

from ssl_exit import __version__
from ssl_exit.cascade.cascade import Cascade
from ssl_exit.cascade.times import StageTimes, stage_times
from ssl_exit.data.hashes import REPEATED, SeenImages, image_hashes, module_hash, settings_hash, unseen
from ssl_exit.data.images import Batch, ImageSource
from ssl_exit.data.preprocessing import AnyPreprocessing
from ssl_exit.data.reading import first_images
from ssl_exit.encoders.build import EncoderSpec
from ssl_exit.encoders.tapped import TappedEncoder
from ssl_exit.errors import InputError
from ssl_exit.exits.certificate import SettingCounts
from ssl_exit.exits.registry import build_rules
from ssl_exit.exits.rules import ExitRule
from ssl_exit.exits.thresholds import Recorded
from ssl_exit.fitting.calibrate import (
    SHAPING,
    ThresholdPath,
    calibrated,
    logits_per_image,
    most_shaping,
    reader,
    shape_path,
    uncertified,
    without_thin_cells,
)
from ssl_exit.fitting.count import Collected, Statistics, collected, count
from ssl_exit.fitting.cut import Cutter, check_patience, check_repeatable, headed_encoder
from ssl_exit.fitting.place import judged, places_exits
from ssl_exit.fitting.record import record, record_logits
from ssl_exit.fitting.sample import Clustering, Sample, described_sample, inertia_of, sample_size
from ssl_exit.fitting.shards import Counted, Own, Shaping, Shard, Survey
from ssl_exit.model import Model
from ssl_exit.provenance import ExitChoice, Provenance
from ssl_exit.settings import Settings

FIT, SHAPE, CERTIFY, UNUSABLE = 0, 1, 2, -1  # roles of images
MANY = 1 << 62  # images, of which no shard knows how many there are


def fit_shard(
    encoder: nn.Module,
    source: ImageSource,
    shard: Shard,
    settings: Settings,
    preprocessing: AnyPreprocessing | None = None,
    spec: EncoderSpec | None = None,
) -> Model:
    """Fit and calibrate a model on the images of all shards; every shard gets the same one.

    Args:
        encoder: images to features, the same in all shards; left unchanged.
        source: images of this shard.
        shard: where it meets the others; entered (`with shard:`), it tells them where this one fails.
        settings: all parameters, the same in all shards but for runtime and device.
        preprocessing: of the images; saved with the model.
        spec: architecture of the encoder, if an `EncoderSpec` built it.

    Raises:
        InputError: settings that need all images in one process, as listed in docs/scale.md; images or an encoder that
            cannot be used; shards of different fits; or another shard failed.
    """
    _check_settings(settings)
    encoder = copy.deepcopy(encoder).cpu().eval()
    example = first_images(source, np.arange(len(source)), settings.batch_size).images.cpu()
    if settings.clusters.head is not None:
        encoder, settings = headed_encoder(encoder, example, settings)
    shape = tuple(example.shape[1:])
    cut, images, exits = Cutter(encoder, example, settings), reader(source, settings, shape), settings.exits
    tapped = cut(exits.points, exits.descriptor, exits.accumulate)
    check_patience(settings, len(tapped.seen))
    check_repeatable(encoder, tapped, example, settings)
    about = hashes_in_common(encoder, settings, preprocessing, shape)
    rules = _rules(tapped, settings)
    clustering = Clustering(settings.k, settings.clusters, settings.random_state)

    wanted = sample_size(MANY, 1, clustering, max(rule.sample_images for rule in rules), tapped.dim)
    own, surveyed = shard.merged(
        "sample", lambda: survey(tapped, images(np.arange(len(source)), "sample"), len(source), wanted, settings, about)
    )
    _check_part(own, about, len(source))
    fit, shape_, certify = (np.flatnonzero(own.roles == role) for role in (FIT, SHAPE, CERTIFY))
    room = most_shaping(logits_per_image(settings))
    shape_ = shape_[_lowest(own.hashes[shape_], np.concatenate(surveyed.held), room, settings)]
    before = {REPEATED: SeenImages([surveyed.before(shard.rank)])}

    def checked(role: int, hashes: np.ndarray) -> np.ndarray:
        if not np.isin(hashes, own.hashes[own.roles == role]).all():
            raise InputError("this job's images are others than when it first read them; give it the same ones")
        return hashes

    sample = surveyed.sample
    final, n_sample = shard.same(lambda: clustering.of(sample))
    scatter = any(rule.needs_scatter for rule in rules)

    def counted() -> tuple[Statistics, dict[int, str]]:
        statistics = count(tapped, images(fit, "fit"), final, sample.origin, scatter=scatter)
        checked(FIT, statistics.images)
        return replace(statistics, skipped={}), statistics.skipped

    skipped, statistics = shard.merged("statistics", counted)
    data = collected(final, statistics, sample, soft=any(rule.needs_soft for rule in rules))

    def fitted(tapped: TappedEncoder, data: Collected) -> Cascade:
        def learnt() -> list[ExitRule]:
            cascade = data.fit(tapped, _rules(tapped, settings), cut.across, settings.random_state)
            return [copy.deepcopy(rule).cpu() for rule in cascade.rules]

        return Cascade.closed(tapped, shard.same(learnt), final, cut.across)

    def said(cascade: Cascade) -> tuple[Shaping, dict[int, str]]:
        def measured() -> StageTimes:
            return stage_times(cascade.tapped, cascade.rules, cascade.final, example)

        times, hashes = cascade.times or shard.first(measured), list[np.ndarray]()
        logits, unusable = record_logits(cascade, unseen(images(shape_, "calibrate"), before, hashes))
        return Shaping(logits, checked(SHAPE, SeenImages(hashes).hashes), times), unusable

    cascade, choices = fitted(tapped, data), list[ExitChoice]()
    if places_exits(settings):
        placing: Shaping = shard.merged("placing", lambda: said(cascade))[1]
        cascade = cascade.timed(placing.times)
        choices = shard.same(lambda: judged(cascade, placing.logits, settings))
    kept = [i for i, choice in enumerate(choices) if choice.kept]
    if 0 < len(kept) < len(choices):
        times = placing.times.without(kept)
        cascade = fitted(cut.only(tapped, kept), data.at(tapped, kept)).timed(times)

    shaping: Shaping
    unshaped, shaping = shard.merged("shaping", lambda: said(cascade))
    timed = cascade.timed(shaping.times)
    path = _same_path(shard, timed, shaping, settings, place=exits.points == "auto" and not choices)

    @cache
    def proof() -> tuple[Recorded, np.ndarray, dict[int, str]]:
        hashes = list[np.ndarray]()
        recorded, unusable = record(path.cascade, unseen(images(certify, "certify"), before, hashes))
        return recorded, checked(CERTIFY, SeenImages(hashes).hashes), unusable

    def told() -> tuple[Counted, dict[int, str]]:
        recorded, hashes, unusable = proof()
        return Counted(SettingCounts.count(path.settings, recorded), hashes), unusable

    if settings.calibration.guarantee == "exit":
        path = without_thin_cells(path, shard.merged("certifying", lambda: (len(proof()[0]), None))[1], settings)
    unproven, proven = shard.merged("counts", told)
    seen = np.union1d(statistics.images, shaping.images) if choices else statistics.images
    inertia = inertia_of(final, sample.features[:n_sample])
    skipped = own.skipped | skipped | unshaped | unproven
    used = Provenance(seen, skipped, data.n_fit, n_sample, tuple(choices), inertia=inertia)
    model = uncertified(encoder, spec, timed, settings, preprocessing, shape, used)
    return calibrated(model, path, proven.counts, shaping.images, proven.images, {}, model.settings)


def _check_settings(settings: Settings) -> None:
    whole = {
        "a front": settings.front.kind != "none",
        "n_clusters='auto'": settings.n_clusters == "auto",
        "mirror": settings.rule.mirror,
        "exits=[]": not len(settings.exits.points),
    }
    if asked := [name for name, is_set in whole.items() if is_set]:
        raise InputError(f"a fit of shards does without {asked[0]}, which needs all images in one process")


def _check_part(own: Own, about: dict[str, str], n: int) -> None:
    """Refuse a part that a job wrote for another fit."""
    differ = [name for name in about if own.about.get(name) != about[name]]
    differ += ["the number of images"] if len(own.roles) != n else []
    if differ:
        raise InputError(f"the part that is there is of another fit (other {', '.join(differ)}); choose a new folder")


def survey(
    tapped: TappedEncoder, batches: Iterable[Batch], n: int, wanted: int, settings: Settings, about: dict[str, str]
) -> tuple[Survey, Own]:
    """The first look at a shard: what every image is for, and the sample of those to fit.

    The encoder runs on images that may be in the sample only.

    Args:
        tapped: the encoder, on the device to use.
        batches: all n images of the shard.
        wanted: images in the sample.
        settings: seed and holdout.
        about: what all shards must have in common.
    """
    roles, content, skipped = np.full(n, UNUSABLE, dtype=np.int8), np.zeros(n, np.uint64), dict[int, str]()
    sample, held = Sample.empty(0, tapped), [np.empty(0, np.uint64)]
    for batch in batches:
        skipped |= batch.skipped
        if len(batch.indices) == 0:
            continue
        hashes = image_hashes(batch.images)
        own = roles_of(hashes, settings)
        roles[batch.indices.numpy()], content[batch.indices.numpy()] = own, hashes
        held.append(hashes[own != FIT])
        full = len(sample) == wanted
        rows = np.flatnonzero((own == FIT) & (hashes < sample.keys[-1] if full else True))
        if len(rows):
            few = Batch(batch.indices[rows], batch.images[torch.from_numpy(rows).to(batch.images.device)])
            sample = (sample + described_sample(tapped, few, hashes[rows], skipped)).lowest(wanted)
    told = Survey(about, wanted, sample, np.unique(np.concatenate(held)))
    return told, Own(about, roles, content, skipped)


def roles_of(hashes: np.ndarray, settings: Settings) -> np.ndarray:
    """What images are for, by content hash, (N,) uint64 -> (N,) int8: multiplied by a random odd number, as the seed
    draws it, they fall into shares of the numbers of 64 bits."""
    holdout = settings.calibration.holdout
    place = _scrambled(hashes, settings.random_state) / 2.0**64
    return np.where(place >= holdout, FIT, np.where(place >= SHAPING * holdout, CERTIFY, SHAPE)).astype(np.int8)


def _lowest(hashes: np.ndarray, held: np.ndarray, most: int, settings: Settings) -> np.ndarray:
    """Which of a shard's images shape thresholds, (n,) bool: at most so many over all shards, drawn by content.

    Args:
        hashes: of those of its images that may, (n,) uint64.
        held: of all images that shards hold out.
    """
    able, seed = np.unique(held), (settings.random_state, 1)
    able = able[roles_of(able, settings) == SHAPE]
    if len(able) <= most:
        return np.ones(len(hashes), dtype=bool)
    limit = np.partition(_scrambled(able, seed), most - 1)[most - 1]
    return _scrambled(hashes, seed) <= limit


def _scrambled(hashes: np.ndarray, seed: int | tuple[int, ...]) -> np.ndarray:
    """Multiplied by a random odd number, modulo 2^64: one to one, and in another order."""
    return hashes * (np.random.default_rng(seed).integers(2**64, dtype=np.uint64) | np.uint64(1))


def _same_path(shard: Shard, cascade: Cascade, shaping: Shaping, settings: Settings, *, place: bool) -> ThresholdPath:
    def made() -> tuple[list[ExitRule], np.ndarray, Recorded, np.ndarray]:  # stages stay where they are
        path = shape_path(cascade, shaping.logits, settings, place=place)
        rules = [copy.deepcopy(rule).cpu() for rule in path.cascade.rules]
        return rules, path.settings, path.recorded, path.costs

    rules, path, recorded, costs = shard.same(made)
    own = replace(cascade, rules=tuple(rule.to(cascade.device) for rule in rules))
    return ThresholdPath(own, path, recorded, costs)


def _rules(tapped: TappedEncoder, settings: Settings) -> list[ExitRule]:
    return build_rules(settings.rule.name, tapped.seen, settings.k, settings.rule.options)


def hashes_in_common(
    encoder: nn.Module, settings: Settings, preprocessing: AnyPreprocessing | None, shape: tuple[int, ...]
) -> dict[str, str]:
    """Hashes of what shards must have in common, by name."""
    own = settings.to_dict()
    common = {name: value for name, value in own.items() if name not in ("runtime", "device", "batch_size")}
    hashed = {name: settings_hash(value) for name, value in common.items()}
    precision, centroids = settings.runtime.precision, settings.clusters.centroids
    return hashed | {
        "encoder": module_hash(encoder),
        "preprocessing": settings_hash(preprocessing.to_dict() if preprocessing else None),
        "shape of images": settings_hash(list(shape)),
        "precision": precision,
        "centroids": settings_hash(None if centroids is None else np.asarray(centroids).tolist()),
        "version": __version__,
    }
