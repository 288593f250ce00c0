"""From held-out images to thresholds in use: temperatures, a path of settings, and the certificate of one of them."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ssl_exit.cascade.cascade import Cascade
from ssl_exit.data.hashes import SeenImages, images_hash, unseen
from ssl_exit.data.images import Batch, ImageSource
from ssl_exit.data.reading import read
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
from ssl_exit.fitting.place import choose
from ssl_exit.fitting.record import Logits, fit_temperatures, mean_probabilities, record, record_logits
from ssl_exit.model import Model, hash_of_cut
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
        place: close exits that do not pay for themselves on these images (see `choose`).
    """
    rules, recorded = fit_temperatures(cascade.rules, cascade.across, logits)
    fresh = replace(cascade, rules=rules, thresholds=np.full_like(cascade.thresholds, np.inf))
    how, (e, k) = settings.calibration, cascade.thresholds.shape
    open_ = list(range(e))
    if place and len(recorded) and not cascade.across.active:
        choices = choose(cascade.exit_names[:-1], recorded, *work(cascade, how.cost), k, settings.max_disagreement)
        open_ = [i for i, choice in enumerate(choices) if choice.kept]
    costs = leaving_costs(cascade, how.cost, open_)
    seen, own = recorded.at(open_), costs[[*open_, -1]]
    if how.thresholds == "cbt":
        path = cbt_path(seen, own, mean_probabilities(rules, logits)[open_])
    else:
        per_cluster = how.thresholds == "search" and len(seen) >= PER_CELL * len(open_) * k
        path = threshold_path(seen, own, k, per_cluster=per_cluster)
    every = np.full((len(path), e, k), np.inf, dtype=np.float32)
    every[:, open_] = path
    return ThresholdPath(fresh, every, recorded, costs)


def work(cascade: Cascade, cost: str) -> tuple[np.ndarray, np.ndarray]:
    """Cost of every stage and of every exit's own work / the full encoder's, (E + 1,) each.

    Args:
        cascade: with measured times.
        cost: "macs" for its multiply-adds, or "time".
    """
    assert cascade.times is not None
    stage, own = cascade.times.stage_seconds, cascade.times.exit_seconds
    own = own + np.append(cascade.times.move_seconds, 0)  # those that stay are moved into the next queue
    if cost == "macs":
        stage = np.array(cascade.tapped.staged.macs, dtype=np.float64)
        own = np.diff(cascade.costs, prepend=0) * (stage.sum() + cascade.final.macs) - stage
    full = stage.sum() + own[-1]
    return stage / full, own / full


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
    room = LOGITS_BYTES // (4 * max(1, logits_per_image))
    shaping, certifying = np.split(held, [min(round(SHAPING * len(held)), room)])
    return shaping, certifying


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
    cascade, how = model.cascade, settings.calibration
    fitted = SeenImages([model.provenance.images])
    shaped: list[np.ndarray] = []
    logits, skipped = record_logits(cascade, unseen(read(shaping, "calibrate"), {FITTED: fitted}, shaped))
    judged = model.settings.exits.points != "auto" or model.provenance.choices
    path = shape_path(cascade, logits, settings, place=not judged)
    certified: list[np.ndarray] = []
    seen = {FITTED: fitted, SHAPED: SeenImages(shaped)}
    proof, more = record(path.cascade, unseen(read(certifying, "certify"), seen, certified))
    if how.guarantee == "exit":  # by how many images certify, not by what they say
        closed = close_thin_cells(
            path.settings, path.recorded, len(proof), settings.max_disagreement, settings.confidence
        )
        path = replace(path, settings=closed)
    counts = SettingCounts.count(path.settings, proof)
    chosen, certificate = certify_path(path, counts, settings)
    new = replace(
        model,
        cascade=chosen,
        settings=replace(
            model.settings,
            max_disagreement=settings.max_disagreement,
            confidence=settings.confidence,
            batch_size=settings.batch_size,
            calibration=how,
        ),
        path=path.settings,
        path_disagreement=counts.disagreements / len(proof) if len(proof) else np.full(len(path.settings), np.nan),
        cut_hash=hash_of_cut(model.encoder, model.fronts),
    )
    issued_for = new.hashes() | {"images": images_hash(SeenImages(certified).hashes)}
    used = replace(model.provenance, shaped=SeenImages(shaped).hashes, calibration_skipped=skipped | more)
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
