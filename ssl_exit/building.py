"""From an encoder and images to a cascade: exits cut and placed, rules fitted, stages timed."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

from ssl_exit.calibration import shape, work
from ssl_exit.cascade import Cascade
from ssl_exit.data.images import Batch, mirrored
from ssl_exit.encoders.tapped import TappedEncoder
from ssl_exit.exits.across import AcrossExits
from ssl_exit.exits.registry import build_rules
from ssl_exit.exits.rules import ExitRule
from ssl_exit.fingerprint import SeenImages, noted
from ssl_exit.fitting import Collected, collect
from ssl_exit.measure.timing import stage_seconds
from ssl_exit.parameters import usable_device
from ssl_exit.placement import ExitChoice, choose

Read = Callable[[np.ndarray, str], Iterable[Batch]]  # images at given positions; what they are read for


@dataclass(frozen=True)
class Built:
    """What fitting leaves, before thresholds.

    Attributes:
        cascade: whose thresholds let nothing exit yet.
        stage_seconds: measured seconds an image of every stage, (E + 1,).
        exit_seconds: of every exit's own work and, last, of the final assignment, (E + 1,).
        choices: why each candidate exit was kept or left out; empty where none was judged.
        images: hashes of the images used, (N,) uint64.
        skipped: position and reason of images that could not be used.
        n_fit: images behind the statistics.
        n_sample: of those, images that k-means saw.
    """

    cascade: Cascade
    stage_seconds: np.ndarray
    exit_seconds: np.ndarray
    choices: list[ExitChoice]
    images: np.ndarray
    skipped: dict[int, str]
    n_fit: int
    n_sample: int


def build(
    encoder: nn.Module,
    given: Mapping[str, Any],
    example: Tensor,
    read: Read,
    order: np.ndarray,
    shaping: np.ndarray,
    classes: np.ndarray | None,
) -> Built:
    """Final clusters and a rule at every exit; with exits="auto" those exits that do not pay are left out again.

    Args:
        encoder: on the CPU; its stages move to the device in use.
        given: parameters of `ExitClusterer`, checked.
        example: a batch of images as the encoder takes them, (N, C, H, W).
        read: gives images.
        order: positions of the images to fit to, in random order.
        shaping: positions of held-out images by which exits are judged.
        classes: in the supervised mode, the class of the image at every position, or None.

    Raises:
        InputError: from `TappedEncoder.build` and `collect`.
    """
    tapped = _cut(encoder, given, given["exits"], example, given["descriptor"], given["accumulate"])
    rules = build_rules(given["rule"], tapped.seen, given["n_clusters"], given["rule_options"])
    used: list[np.ndarray] = []
    passes = [noted(read(order, "fit"), used)]
    if given["mirror"]:
        passes.append(mirrored(read(order, "fit, mirrored")))
    collected = collect(
        tapped,
        passes,
        len(order),
        n_clusters=given["n_clusters"],
        spherical=given["spherical"],
        seed=given["random_state"],
        scatter=any(rule.needs_scatter for rule in rules),
        soft=any(rule.needs_soft for rule in rules),
        sample_images=max(rule.sample_images for rule in rules),
        supervised=given["supervised"],
        classes=classes,
    )
    cascade, stages, exits = _fitted(collected, tapped, rules, given, example)
    choices = _choices(cascade, stages, exits, given, read, shaping)
    kept = [i for i, choice in enumerate(choices) if choice.kept]
    if 0 < len(kept) < len(choices):
        collected = collected.at(tapped, kept)
        kinds = [tapped.descriptors[i].kind for i in kept]
        encoder.cpu()  # stages of the first cut share its parameters and may have moved them
        tapped = _cut(encoder, given, [choices[i].name for i in kept], example, kinds, tapped.accumulate)
        rules = build_rules(given["rule"], tapped.seen, given["n_clusters"], given["rule_options"])
        cascade, stages, exits = _fitted(collected, tapped, rules, given, example)
    images, skipped = SeenImages(used).hashes, collected.skipped
    return Built(cascade, stages, exits, choices, images, skipped, collected.n_fit, collected.n_clustered)


def _cut(
    encoder: nn.Module,
    given: Mapping[str, Any],
    exits: str | Sequence[str],
    example: Tensor,
    descriptor: str | Sequence[str],
    accumulate: bool,
) -> TappedEncoder:
    tapped = TappedEncoder.build(
        encoder, exits, example, descriptor=descriptor, accumulate=accumulate, normalize=given["normalize"]
    )
    return tapped.eval().to(usable_device(given["device"]))


def _fitted(
    collected: Collected, tapped: TappedEncoder, rules: Sequence[ExitRule], given: Mapping[str, Any], example: Tensor
) -> tuple[Cascade, np.ndarray, np.ndarray]:
    """A cascade with fitted rules, and seconds an image of its stages and of its exits, (E + 1,) each."""
    across = AcrossExits(given["patience"], given["ensemble"])
    cascade = collected.fit(tapped, rules, across, given["random_state"])
    return cascade, *stage_seconds(cascade, example)


def _choices(
    cascade: Cascade,
    stage_seconds: np.ndarray,
    exit_seconds: np.ndarray,
    given: Mapping[str, Any],
    read: Read,
    shaping: np.ndarray,
) -> list[ExitChoice]:
    """Which of the exits in place pay for themselves on held-out images.

    None are judged where they were named, where nothing is held out, and where exits depend on each other (patience,
    ensembling): without one, others say otherwise.
    """
    if given["exits"] != "auto" or len(shaping) == 0 or given["patience"] > 1 or given["ensemble"]:
        return []
    recorded, _, _ = shape(cascade.with_own_rules(), read(shaping, "place exits"), len(shaping))
    if len(recorded) == 0:
        return []
    names = [point.name for point in cascade.tapped.staged.exit_points]
    stage, own = work(cascade, stage_seconds, exit_seconds, given["cost"])
    return choose(names, recorded, stage, own, given["n_clusters"], given["max_disagreement"])
