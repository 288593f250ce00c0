"""From held-out images to thresholds in use: temperatures, a path of settings, and the certificate of one of them."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from ssl_exit.cascade import Cascade
from ssl_exit.data.images import Batch, ImageSource
from ssl_exit.data.reading import name_of
from ssl_exit.errors import InputError
from ssl_exit.exits.cbt import cbt_path
from ssl_exit.exits.certificate import Certificate, certify, close_thin_cells
from ssl_exit.exits.thresholds import threshold_path, trade_off
from ssl_exit.fingerprint import SeenImages, unseen

LOGITS_BYTES = 1 << 28  # for the logits of the images that shape the threshold path
FITTED = "an image of the same content was used in fit()"
SHAPED = "an image of the same content shaped the thresholds"
SHAPING = 1 / 4  # share of the held-out images that shape the threshold path; the others certify


@dataclass(frozen=True)
class Calibration:
    """What held-out images settled.

    Attributes:
        cascade: with temperatures and thresholds set.
        certificate: of those thresholds.
        path: settings that were considered, (S, E, K), surest first.
        path_disagreement: share of the certifying images each of them gives another label, (S,); NaN without any.
        shaped: hashes of the images that shaped the path, uint64.
        images: hashes of the images that certified, uint64.
        skipped: position and reason of images that could not be used.
    """

    cascade: Cascade
    certificate: Certificate
    path: np.ndarray
    path_disagreement: np.ndarray
    shaped: np.ndarray
    images: np.ndarray
    skipped: dict[int, str]


def split_held_out(held: np.ndarray, logits_per_image: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions of held-out images, (n,): those that shape thresholds, as memory allows, and those that certify."""
    room = LOGITS_BYTES // (4 * max(1, logits_per_image))
    shaping, certifying = np.split(held, [min(round(SHAPING * len(held)), room)])
    return shaping, certifying


def refuse_fitted(skipped: Mapping[int, str], source: ImageSource) -> None:
    """Raise InputError if any of these images was used in fit()."""
    again = [position for position, reason in skipped.items() if reason == FITTED]
    if again:
        raise InputError(
            f"{len(again)} of the {len(source)} images were used in fit() already, such as "
            f"{name_of(source, again[0])}; calibrate on images that fit() did not see"
        )


def work(cascade: Cascade, cost: str) -> tuple[np.ndarray, np.ndarray]:
    """Cost of every stage and of every exit's own work / the whole encoder's, (E + 1,) each.

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
    whole = stage.sum() + own[-1]
    return stage / whole, own / whole


def calibrate(
    cascade: Cascade,
    batches: Callable[[np.ndarray, str], Iterable[Batch]],
    shaping: np.ndarray,
    certifying: np.ndarray,
    costs: np.ndarray,
    seen: SeenImages,
    *,
    thresholds: str,
    guarantee: str,
    max_disagreement: float,
    confidence: float,
) -> Calibration:
    """Set temperatures and thresholds of a copy of the cascade, and certify them.

    Images whose content was used before are skipped: copies of images that the cascade was fitted to, copies of each
    other, and, among those that certify, copies of images that shape.

    Args:
        cascade: stays as it is.
        batches: images at given positions; the second argument names what they are for.
        shaping: positions of the images that shape the threshold path.
        certifying: positions of the images on which its settings are tried; none of them in `shaping`.
        costs: cost of leaving at each exit and, last, of the whole encoder, (E + 1,).
        seen: images that the cascade was fitted to.
        thresholds: "search", "exit" or "cbt".
        guarantee: "overall", "cluster", "exit" or "expectation".
        max_disagreement: eps.
        confidence: 1 - delta.
    """
    fresh = cascade.with_own_rules()
    shaped: list[np.ndarray] = []
    logits, final, skipped = fresh.logits(unseen(batches(shaping, "calibrate"), {FITTED: seen}, shaped), len(shaping))
    recorded = fresh.fit_temperatures(logits, final)
    if thresholds == "cbt":
        path = cbt_path(recorded, costs, fresh.mean_probabilities(logits, final))
    else:
        path = threshold_path(recorded, costs, cascade.final.n_clusters, per_cluster=thresholds == "search")
    proved: list[np.ndarray] = []
    used = {FITTED: seen, SHAPED: SeenImages(shaped)}
    proof, more = fresh.record(unseen(batches(certifying, "certify"), used, proved), len(certifying))
    if guarantee == "exit":  # by how many images certify, not by what they say
        path = close_thin_cells(path, recorded, len(proof), max_disagreement, confidence)
    chosen, certificate = certify(path, proof, costs, max_disagreement, confidence, guarantee)
    fresh.thresholds.copy_(torch.from_numpy(chosen))
    disagreement = 1 - trade_off(path, proof, costs)[1] if len(proof) else np.full(len(path), np.nan)
    used_here = SeenImages(shaped).hashes, SeenImages(proved).hashes
    return Calibration(fresh, certificate, path, disagreement, *used_here, skipped | more)
