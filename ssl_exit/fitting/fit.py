"""From an encoder and images to a model: exits cut and placed, rules fitted, stages timed, thresholds calibrated."""

import copy
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from torch import Tensor, nn

from ssl_exit.cascade.cascade import Cascade
from ssl_exit.cascade.times import stage_times
from ssl_exit.data.hashes import SeenImages, module_hash, noted
from ssl_exit.data.images import ImageSource, mirrored
from ssl_exit.data.preprocessing import Preprocessing
from ssl_exit.data.reading import first_images
from ssl_exit.encoders.inference import usable_device
from ssl_exit.encoders.stages import MOST_EXITS
from ssl_exit.encoders.tapped import TappedEncoder
from ssl_exit.errors import InputError
from ssl_exit.exits.across import AcrossExits
from ssl_exit.exits.certificate import SettingCounts, certify
from ssl_exit.exits.registry import build_rules, rule_classes
from ssl_exit.exits.rules import ExitRule
from ssl_exit.exits.thresholds import Recorded
from ssl_exit.fitting.calibrate import Read, calibrate, reader, split_held_out, work
from ssl_exit.fitting.count import Collected, collect
from ssl_exit.fitting.place import choose
from ssl_exit.fitting.record import fit_temperatures, record_logits
from ssl_exit.model import ExitChoice, Model, Provenance
from ssl_exit.settings import Settings


def fit(
    encoder: nn.Module,
    source: ImageSource,
    settings: Settings,
    preprocessing: Preprocessing | None = None,
    classes: np.ndarray | None = None,
    spec: str | None = None,
) -> Model:
    """Find final clusters, fit an exit rule at every exit point, and calibrate on images held out by seed.

    Args:
        encoder: images to features; left unchanged.
        source: images.
        settings: all parameters.
        preprocessing: of the images; saved with the model.
        classes: in the supervised mode, the class of every image, (N,) int64, or None.
        spec: name of the `EncoderSpec` that built the encoder, if one did.

    Raises:
        InputError: settings, images or an encoder that cannot be used.
    """
    order = np.random.default_rng(settings.random_state).permutation(len(source))
    held, fitted = np.split(order, [round(settings.calibration.holdout * len(source))])
    encoder = copy.deepcopy(encoder).cpu().eval()
    example = first_images(source, fitted, settings.batch_size).images.cpu()
    shape = tuple(example.shape[1:])

    images = reader(source, settings, shape)
    parts = split_held_out(held, logits_per_image(settings))
    cascade, provenance = _build(encoder, settings, example, images, fitted, parts[0], classes)
    path = cascade.thresholds[None]
    nothing = SettingCounts.count(path, Recorded.empty(len(cascade.rules)))
    _, certificate = certify(path, nothing, cascade.costs, settings.max_disagreement, settings.confidence)
    model = Model(
        encoder, spec, cascade, settings, preprocessing, shape, certificate, path, np.full(1, np.nan), provenance,
        module_hash(encoder),
    )  # fmt: skip
    model = calibrate(model, images, parts, settings)
    used = model.provenance
    seen = np.union1d(used.images, used.shaped) if used.choices else used.images  # chosen by the images that shape
    used = replace(used, images=seen, skipped=used.skipped | used.calibration_skipped)
    return replace(model, provenance=used)


def recalibrate(model: Model, source: ImageSource, settings: Settings) -> Model:
    """Set thresholds and certificate anew, from images that the fit did not see (see `calibrate`)."""
    order = np.random.default_rng(settings.random_state).permutation(len(source))
    if module_hash(model.encoder) != model.encoder_hash:  # a certificate is about both, encoder and what runs
        model = model.recut()
    held = split_held_out(order, logits_per_image(model.settings))
    return calibrate(model, reader(source, settings, model.image_shape), held, settings)


def logits_per_image(settings: Settings) -> int:
    """Numbers that exits say of an image, at most."""
    points = settings.exits.points
    exits = MOST_EXITS if isinstance(points, str) else len(points)
    return exits * len(rule_classes(settings.rule.name)) * (settings.n_clusters + 1)


def _build(
    encoder: nn.Module,
    settings: Settings,
    example: Tensor,
    images: Read,
    order: np.ndarray,
    shaping: np.ndarray,
    classes: np.ndarray | None,
) -> tuple[Cascade, Provenance]:
    """Final clusters and a rule at every exit; with exits="auto" those exits that do not pay are left out again."""
    exits, precision, device = settings.exits, settings.runtime.precision, usable_device(settings.device)

    def cut(points: str | Sequence[str], descriptor: str | Sequence[str], accumulate: bool) -> TappedEncoder:
        tapped = TappedEncoder.build(
            encoder, points, example, descriptor=descriptor, accumulate=accumulate, normalize=exits.normalize
        )
        return tapped.for_inference(precision, example.shape[1:]).to(device)

    def rules_of(tapped: TappedEncoder) -> list[ExitRule]:
        return build_rules(settings.rule.name, tapped.seen, settings.n_clusters, settings.rule.options)

    def fitted(collected: Collected, tapped: TappedEncoder, rules: list[ExitRule]) -> Cascade:
        return collected.fit(tapped, rules, AcrossExits(exits.patience, exits.ensemble), settings.random_state)

    points = exits.points if isinstance(exits.points, str) else list(exits.points)
    tapped = cut(points, exits.descriptor, exits.accumulate)
    if exits.patience > len(tapped.seen):
        raise InputError(
            f"patience {exits.patience} lets nothing leave at {len(tapped.seen)} exits; lower it or name more exits"
        )
    rules = rules_of(tapped)
    used: list[np.ndarray] = []
    passes = [noted(images(order, "fit"), used)]
    if settings.rule.mirror:
        passes.append(noted(mirrored(images(order, "fit, mirrored")), used))
    collected = collect(
        tapped,
        passes,
        len(order),
        rules,
        n_clusters=settings.n_clusters,
        clusters=settings.clusters,
        seed=settings.random_state,
        classes=classes,
    )
    cascade = fitted(collected, tapped, rules)
    cascade = replace(cascade, times=stage_times(tapped, cascade.rules, cascade.final, example))
    choices = _choices(cascade, settings, images, shaping)
    kept = [i for i, choice in enumerate(choices) if choice.kept]
    if 0 < len(kept) < len(choices):
        assert cascade.times is not None
        times = cascade.times.without(kept)
        collected = collected.at(tapped, kept)
        tapped = cut([choices[i].name for i in kept], [tapped.descriptors[i].kind for i in kept], tapped.accumulate)
        cascade = replace(fitted(collected, tapped, rules_of(tapped)), times=times)
    skipped = collected.statistics.skipped
    used_images = SeenImages(used).hashes
    return cascade, Provenance(used_images, skipped, collected.n_fit, collected.n_clustered, tuple(choices))


def _choices(cascade: Cascade, settings: Settings, images: Read, shaping: np.ndarray) -> list[ExitChoice]:
    """Which of the candidate exits pay for themselves on held-out images.

    None are judged where they were named, where nothing is held out, and where exits depend on each other (patience,
    ensembling): without one, others say otherwise.
    """
    if settings.exits.points != "auto" or len(shaping) == 0 or cascade.across.active:
        return []
    logits, _ = record_logits(cascade, images(shaping, "place exits"))
    if len(logits) == 0:
        return []
    _, recorded = fit_temperatures(cascade.rules, cascade.across, logits)
    stage, own = work(cascade, settings.calibration.cost)
    names = cascade.exit_names[:-1]
    return choose(names, recorded, stage, own, settings.n_clusters, settings.max_disagreement)
