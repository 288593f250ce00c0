"""From an encoder and images to a cascade: exits cut and placed, rules fitted, stages timed."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ssl_exit.calibration import work
from ssl_exit.cascade import Cascade
from ssl_exit.data.images import Batch, mirrored
from ssl_exit.encoders.compiling import can_compile
from ssl_exit.encoders.tapped import TappedEncoder
from ssl_exit.errors import InputError
from ssl_exit.exits.across import AcrossExits
from ssl_exit.exits.registry import build_rules
from ssl_exit.exits.rules import ExitRule
from ssl_exit.fingerprint import SeenImages, noted
from ssl_exit.fitting import Collected, collect
from ssl_exit.parameters import usable_device
from ssl_exit.placement import ExitChoice, choose
from ssl_exit.timing import stage_times

Read = Callable[[np.ndarray, str], Iterable[Batch]]  # images at given positions; what they are read for


@dataclass(frozen=True)
class Built:
    """What fitting leaves, before thresholds.

    Attributes:
        cascade: whose thresholds let nothing exit yet.
        choices: why each candidate exit was kept or left out; empty where none was judged.
        images: hashes of the images used, (N,) uint64.
        skipped: position and reason of images that could not be used.
        n_fit: images behind the statistics.
        n_sample: of those, images that k-means saw.
    """

    cascade: Cascade
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
        encoder: stays as it is; what runs is a copy.
        given: parameters of `ExitClusterer`, checked.
        example: a batch of images as the encoder takes them, (N, C, H, W).
        read: gives images.
        order: positions of the images to fit to, in random order.
        shaping: positions of held-out images by which exits are judged.
        classes: in the supervised mode, the class of the image at every position, or None.

    Raises:
        InputError: from `TappedEncoder.build` and `collect`, or more patience than exits.
    """
    tapped = cut(encoder, given, given["exits"], example, given["descriptor"], given["accumulate"])
    if given["patience"] > len(tapped.seen):
        raise InputError(
            f"patience {given['patience']} lets nothing leave at {len(tapped.seen)} exits; lower it or name more exits"
        )
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
    cascade = _fitted(collected, tapped, rules, given)
    cascade.times = stage_times(cascade, example)
    choices = _choices(cascade, given, read, shaping)
    kept = [i for i, choice in enumerate(choices) if choice.kept]
    if 0 < len(kept) < len(choices):
        collected = collected.at(tapped, kept)
        kinds = [tapped.descriptors[i].kind for i in kept]
        times = cascade.times.without(kept)
        tapped = cut(encoder, given, [choices[i].name for i in kept], example, kinds, tapped.accumulate)
        rules = build_rules(given["rule"], tapped.seen, given["n_clusters"], given["rule_options"])
        cascade = _fitted(collected, tapped, rules, given)
        cascade.times = times
    images, skipped = SeenImages(used).hashes, collected.skipped
    return Built(cascade, choices, images, skipped, collected.n_fit, collected.n_clustered)


def cut(
    encoder: nn.Module,
    given: Mapping[str, Any],
    exits: str | Sequence[str],
    example: Tensor,
    descriptor: str | Sequence[str],
    accumulate: bool,
) -> TappedEncoder:
    """The copy of an encoder that runs, on the device in use (see `TappedEncoder.build` and `for_inference`)."""
    tapped = TappedEncoder.build(
        encoder, exits, example, descriptor=descriptor, accumulate=accumulate, normalize=given["normalize"]
    )
    return tapped.for_inference(given["precision"], example.shape[1:]).to(usable_device(given["device"]))


def cut_anew(cascade: Cascade, encoder: nn.Module, given: Mapping[str, Any], image: Sequence[int]) -> Cascade:
    """The same exits and rules over a new copy of an encoder whose weights changed; thresholds let nothing exit.

    Args:
        cascade: stays as it is.
        encoder: on the CPU, of the same architecture.
        given: parameters of `ExitClusterer`, as they were when it was fitted.
        image: shape of an image, (C, H, W).
    """
    old = cascade.tapped
    names = [point.name for point in old.staged.exit_points]
    kinds = [descriptor.kind for descriptor in old.descriptors]
    example = torch.zeros(1, *image)
    return cascade.with_own_rules(cut(encoder, given, names, example, kinds, old.accumulate))


def _fitted(
    collected: Collected, tapped: TappedEncoder, rules: Sequence[ExitRule], given: Mapping[str, Any]
) -> Cascade:
    across = AcrossExits(given["patience"], given["ensemble"])
    cascade = collected.fit(tapped, rules, across, given["random_state"])
    cascade.compiles = given["compile"] and can_compile(cascade.thresholds.device)
    return cascade


def _choices(cascade: Cascade, given: Mapping[str, Any], read: Read, shaping: np.ndarray) -> list[ExitChoice]:
    """Which of the exits in place pay for themselves on held-out images.

    None are judged where they were named, where nothing is held out, and where exits depend on each other (patience,
    ensembling): without one, others say otherwise.
    """
    if given["exits"] != "auto" or len(shaping) == 0 or given["patience"] > 1 or given["ensemble"]:
        return []
    fresh = cascade.with_own_rules()
    logits, final, _ = fresh.logits(read(shaping, "place exits"), len(shaping))
    recorded = fresh.fit_temperatures(logits, final)
    if len(recorded) == 0:
        return []
    names = [point.name for point in cascade.tapped.staged.exit_points]
    stage, own = work(cascade, given["cost"])
    return choose(names, recorded, stage, own, given["n_clusters"], given["max_disagreement"])
