"""From held-out images to thresholds in use: temperatures, a path of settings, and the certificate of one of them."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import nn

from ssl_exit.cascade.cascade import Cascade
from ssl_exit.data.hashes import SeenImages, images_hash, unseen
from ssl_exit.data.images import Batch, ImageSource
from ssl_exit.data.preprocessing import AnyPreprocessing
from ssl_exit.data.reading import read
from ssl_exit.encoders.build import EncoderSpec
from ssl_exit.encoders.front import FrontDescriptor
from ssl_exit.encoders.stages import MOST_EXITS
from ssl_exit.errors import InputError
from ssl_exit.exits.cbt import cbt_path
from ssl_exit.exits.certificate import (
    Certificate,
    SettingCounts,
    certify,
    close_thin_cells,
    fewest_images,
    fewest_on_average,
)
from ssl_exit.exits.registry import rule_classes
from ssl_exit.exits.thresholds import Recorded, threshold_path
from ssl_exit.fitting.place import chosen, work
from ssl_exit.fitting.record import Logits, fit_temperatures, mean_probabilities, record, record_logits
from ssl_exit.model import Model, hash_of_cut
from ssl_exit.provenance import Provenance
from ssl_exit.settings import Settings

LOGITS_BYTES = 1 << 28  # for the logits of the images that shape the threshold path
FITTED = "an image of the same content was used in fit()"
SHAPED = "an image of the same content shaped the thresholds"
SHAPING = 1 / 4  # share of the held-out images that shape the threshold path; the others certify
PER_CELL = 6  # images that shape, for every exit and cluster, from which on each has a threshold of its own

Read = Callable[[np.ndarray, str], Iterable[Batch]]  # images at some positions; the task they are read for


def reader(source: ImageSource, settings: Settings, shape: tuple[int, ...]) -> Read:
    """Reads images of one shape, (C, H, W), from a source."""

    def read_task(order: np.ndarray, task: str) -> Iterator[Batch]:
        return read(source, order, settings.batch_size, shape, task, progress=settings.runtime.progress)

    return read_task


@dataclass(frozen=True)
class ThresholdPath:
    """Settings to be tried on images that did not shape them.

    Attributes:
        cascade: with temperatures set; its thresholds let nothing exit.
        settings: thresholds, (S, E, K), surest first.
        recorded: the images that shaped them.
        costs: of leaving at each exit and, last, of the full encoder, (E + 1,), with the exits of the path at work.
    """

    cascade: Cascade
    settings: np.ndarray
    recorded: Recorded
    costs: np.ndarray


def shape_path(cascade: Cascade, logits: Logits, settings: Settings, *, place: bool = False) -> ThresholdPath:
    """Set temperatures, and search a path of threshold settings, from the logits of held-out images.

    With thresholds "search" every exit and cluster has one of its own where at least `PER_CELL` images for each shape
    the path, and every exit one otherwise: fitted to fewer images, ten times as many thresholds certify less.

    Args:
        cascade: left unchanged.
        logits: of all images that shape the path.
        settings: thresholds and cost.
        place: close exits that do not pay for themselves on these images (see `chosen`).
    """
    rules, recorded = fit_temperatures(cascade.rules, cascade.across, logits)
    probabilities = mean_probabilities(rules, logits) if settings.calibration.thresholds == "cbt" else None
    return path_from(replace(cascade, rules=rules), recorded, settings, place=place, probabilities=probabilities)


def path_from(
    cascade: Cascade,
    recorded: Recorded,
    settings: Settings,
    *,
    place: bool = False,
    probabilities: np.ndarray | None = None,
) -> ThresholdPath:
    """`shape_path` from labels and scores.

    Args:
        cascade: with temperatures set.
        recorded: of all images that shape the path.
        settings, place: as in `shape_path`.
        probabilities: of thresholds "cbt", what `mean_probabilities` says.
    """
    fresh = cascade.at(np.full_like(cascade.thresholds, np.inf))
    how, (e, k) = settings.calibration, cascade.thresholds.shape
    open_ = list(range(e))
    if place and len(recorded) and not cascade.across.active:
        choices = chosen(cascade.exit_names[:-1], recorded, *work(cascade, how.cost), k, settings.max_disagreement)
        open_ = [i for i, choice in enumerate(choices) if choice.kept]
    costs = leaving_costs(cascade, how.cost, open_)
    seen, own = recorded.at(open_), costs[[*open_, -1]]
    if probabilities is not None:
        path = cbt_path(seen, own, probabilities[open_])
    else:
        per_cluster = how.thresholds == "search" and len(seen) >= PER_CELL * len(open_) * k
        path = threshold_path(seen, own, k, per_cluster=per_cluster)
    every = np.full((len(path), e, k), np.inf, dtype=np.float32)
    every[:, open_] = path
    return ThresholdPath(fresh, every, recorded, costs)


def leaving_costs(cascade: Cascade, cost: str, open_: Sequence[int]) -> np.ndarray:
    """Cost of leaving at each exit and, last, of the full encoder, (E + 1,), where some exits let images leave."""
    stage, own = work(cascade, cost)
    used = np.zeros(len(own), dtype=bool)
    used[[*open_, -1]] = True
    if cascade.tapped.accumulate or cascade.across.active:  # exits before an open one work too
        used[: max(open_) + 1] = True
    return np.cumsum(stage + own * used)


def certify_path(path: ThresholdPath, counts: SettingCounts, settings: Settings) -> tuple[Cascade, Certificate]:
    """The cascade at the cheapest setting that the counts certify, and its certificate.

    Args:
        path: settings that were tried.
        counts: of images that did not shape them, all shards added up.
        settings: guarantee, disagreement and confidence.
    """
    eps, confidence = settings.max_disagreement, settings.confidence
    setting, certificate = certify(path.settings, counts, path.costs, eps, confidence, settings.calibration.guarantee)
    return path.cascade.at(path.settings[setting]), certificate


def hold_out(n: int, settings: Settings) -> tuple[np.ndarray, np.ndarray]:
    """Positions of images that fit() holds out for calibration, and of those that it fits to, both in random order."""
    order = np.random.default_rng(settings.random_state).permutation(n)
    held, fitted = np.split(order, [round(settings.calibration.holdout * n)])
    return held, fitted


def split_held_out(held: np.ndarray, logits_per_image: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions of held-out images, (n,): those that shape thresholds, as memory allows, and those that certify."""
    shaping, certifying = np.split(held, [min(round(SHAPING * len(held)), most_shaping(logits_per_image))])
    return shaping, certifying


def most_shaping(logits_per_image: int) -> int:
    """Images that shape thresholds at most, as memory allows."""
    return LOGITS_BYTES // (4 * max(1, logits_per_image))


def calibrate(model: Model, read: Read, held: tuple[np.ndarray, np.ndarray], settings: Settings) -> Model:
    """Thresholds and certificate from held-out images.

    Images whose content was used before are skipped: copies of images that the model was fitted to, copies of each
    other, and, among those that certify, copies of images that shape.

    Args:
        model: left unchanged.
        read: returns images.
        held: positions of the images that shape the threshold path, and of those that certify.
        settings: max_disagreement, confidence and calibration are used.

    Returns:
        The model with new thresholds, path and certificate; its provenance says what was used and skipped.
    """
    shaping, certifying = held
    cascade = model.cascade
    fitted = SeenImages([model.provenance.images])
    shaped: list[np.ndarray] = []
    logits, skipped = record_logits(cascade, unseen(read(shaping, "calibrate"), {FITTED: fitted}, shaped))
    judged = model.settings.exits.points != "auto" or model.provenance.choices
    path = shape_path(cascade, logits, settings, place=not judged)
    certified: list[np.ndarray] = []
    seen = {FITTED: fitted, SHAPED: SeenImages(shaped)}
    proof, more = record(path.cascade, unseen(read(certifying, "certify"), seen, certified))
    path = without_thin_cells(path, len(proof), settings)
    counts = SettingCounts.count(path.settings, proof)
    used = SeenImages(shaped).hashes, SeenImages(certified).hashes, skipped | more
    return calibrated(model, path, counts, *used, settings)


def without_thin_cells(path: ThresholdPath, n: int, settings: Settings) -> ThresholdPath:
    """The path that n images can certify: with guarantee "exit", cells where too few would leave are closed, by how
    many images certify and not by what they say."""
    if settings.calibration.guarantee != "exit":
        return path
    closed = close_thin_cells(path.settings, path.recorded, n, settings.max_disagreement, settings.confidence)
    return replace(path, settings=closed)


def uncertified(
    encoder: nn.Module,
    spec: EncoderSpec | None,
    cascade: Cascade,
    settings: Settings,
    preprocessing: AnyPreprocessing | None,
    shape: tuple[int, ...],
    provenance: Provenance,
    fronts: tuple[FrontDescriptor, ...] = (),
) -> Model:
    """A model whose thresholds let nothing exit, which `calibrated` needs; see `Model` for the arguments."""
    path = cascade.thresholds[None]
    nothing = SettingCounts.count(path, Recorded.empty(len(cascade.rules)))
    _, certificate = certify(path, nothing, cascade.costs, settings.max_disagreement, settings.confidence)
    front, clusters = replace(settings.front, network=None), replace(settings.clusters, centroids=None)
    settings = replace(settings, front=front, clusters=clusters)  # the model has its own
    return Model(
        encoder, spec, cascade, settings, preprocessing, shape, certificate, path, np.full(1, np.nan), provenance,
        hash_of_cut(encoder, fronts), fronts,
    )  # fmt: skip


def calibrated(
    model: Model,
    path: ThresholdPath,
    counts: SettingCounts,
    shaped: np.ndarray,
    certified: np.ndarray,
    skipped: dict[int, str],
    settings: Settings,
    outcome: tuple[Cascade, Certificate] | None = None,
) -> Model:
    """The model with thresholds from a path, and a certificate from counts.

    Args:
        model: left unchanged.
        path: settings that were tried.
        counts: of the images that certify.
        shaped, certified: content hashes of the images that shaped the path, and of those that certify, uint64.
        skipped: position and reason of images that could not be used.
        settings: max_disagreement, confidence, batch_size and calibration are used.
        outcome: of another test than `certify_path`.
    """
    chosen, certificate = outcome or certify_path(path, counts, settings)
    new = replace(
        model,
        cascade=chosen,
        settings=replace(
            model.settings,
            max_disagreement=settings.max_disagreement,
            confidence=settings.confidence,
            batch_size=settings.batch_size,
            calibration=settings.calibration,
        ),
        path=path.settings,
        path_disagreement=counts.disagreements / counts.n if counts.n else np.full(len(path.settings), np.nan),
        cut_hash=hash_of_cut(model.encoder, model.fronts),
    )
    issued_for = new.hashes() | {"images": images_hash(certified)}
    used = replace(model.provenance, shaped=shaped, calibration_skipped=skipped)
    return replace(new, certificate=replace(certificate, issued_for=issued_for), provenance=used)


def refuse_fitted(skipped: Mapping[int, str], source: ImageSource) -> None:
    """Raise InputError if any of these images was used in fit()."""
    again = [position for position, reason in skipped.items() if reason == FITTED]
    if again:
        raise InputError(
            f"{len(again)} of the {len(source)} images were used in fit() already, such as {source.name(again[0])}; "
            "calibrate on images that fit() did not see"
        )


def too_few(n: int, settings: Settings) -> str:
    """Why n images cannot certify what is wanted, known before any is looked at; empty where they may."""
    how, eps, confidence = settings.calibration, settings.max_disagreement, settings.confidence
    average = how.guarantee == "expectation"
    needed = fewest_on_average(eps) if average else fewest_images(eps, confidence)
    if how.guarantee == "cluster" and settings.n_clusters != "auto":
        needed *= settings.n_clusters
    _, certifying = split_held_out(hold_out(n, settings)[0], logits_per_image(settings))
    if how.holdout == 0 or len(certifying) >= needed:
        return ""
    wanted = int(np.ceil(needed / (1 - SHAPING) / how.holdout))
    return (
        f"no image may exit early: of {n} images {len(certifying)} are held out to certify disagreement <= {eps:.2%} "
        f"with confidence {confidence:.0%}, which takes at least {needed}: give at least {wanted} images, call "
        "calibrate() with more, raise max_disagreement or holdout, or lower confidence"
    )


def logits_per_image(settings: Settings) -> int:
    """Numbers that exits say of an image, at most."""
    points = settings.exits.points
    front = settings.front
    fronts = 0 if front.kind == "none" else len(front.shares)
    exits = fronts + (len(points) if not isinstance(points, str) else 0 if fronts else MOST_EXITS)
    k = 1 if settings.n_clusters == "auto" else settings.n_clusters
    return exits * len(rule_classes(settings.rule.name)) * (k + 1)


def warn_of_nothing(certificate: Certificate, stacklevel: int) -> None:
    """One warning where nothing may exit early."""
    if certificate.early == 0:
        warnings.warn(str(certificate), stacklevel=stacklevel + 1)
