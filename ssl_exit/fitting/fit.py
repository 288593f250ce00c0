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
from ssl_exit.data.kept import Kept
from ssl_exit.data.preprocessing import Preprocessing
from ssl_exit.data.reading import first_images
from ssl_exit.encoders.front import Front
from ssl_exit.encoders.inference import usable_device
from ssl_exit.encoders.stages import MOST_EXITS
from ssl_exit.encoders.tapped import TappedEncoder
from ssl_exit.errors import InputError
from ssl_exit.exits.across import AcrossExits
from ssl_exit.exits.certificate import SettingCounts, certify
from ssl_exit.exits.front import FrontRule
from ssl_exit.exits.registry import build_rules, rule_classes
from ssl_exit.exits.rules import ExitRule
from ssl_exit.exits.thresholds import Recorded
from ssl_exit.fitting.calibrate import Read, calibrate, reader, split_held_out, work
from ssl_exit.fitting.count import Collected, collect
from ssl_exit.fitting.front import Assigned, assign, sized_fronts, taught_fronts
from ssl_exit.fitting.place import choose
from ssl_exit.fitting.record import fit_temperatures, record_logits
from ssl_exit.model import ExitChoice, Model, Provenance, Teaching
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
    cascade, fronts, provenance = _build(encoder, source, settings, example, images, fitted, parts[0], classes)
    settings = replace(settings, front=replace(settings.front, network=None))  # it is among the model's fronts
    path = cascade.thresholds[None]
    nothing = SettingCounts.count(path, Recorded.empty(len(cascade.rules)))
    _, certificate = certify(path, nothing, cascade.costs, settings.max_disagreement, settings.confidence)
    model = Model(
        encoder, spec, cascade, settings, preprocessing, shape, certificate, path, np.full(1, np.nan), provenance,
        module_hash(encoder), fronts,
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
    front = settings.front
    fronts = 0 if front.kind == "none" else len(front.shares)
    exits = fronts + (len(points) if not isinstance(points, str) else 0 if fronts else MOST_EXITS)
    return exits * len(rule_classes(settings.rule.name)) * (settings.n_clusters + 1)


def _build(
    encoder: nn.Module,
    source: ImageSource,
    settings: Settings,
    example: Tensor,
    images: Read,
    order: np.ndarray,
    shaping: np.ndarray,
    classes: np.ndarray | None,
) -> tuple[Cascade, tuple[Front, ...], Provenance]:
    """Final clusters, fronts, and a rule at every exit; with exits="auto" those exits that do not pay are left out
    again. Behind a front "auto" means none."""
    exits, precision, device = settings.exits, settings.runtime.precision, usable_device(settings.device)
    fronts: list[Front] = []
    taught: list[FrontRule] = []
    teaching: list[Teaching] = []

    def cut(points: str | Sequence[str], descriptor: str | Sequence[str], accumulate: bool) -> TappedEncoder:
        tapped = TappedEncoder.build(
            encoder, points, example, descriptor=descriptor, accumulate=accumulate, normalize=exits.normalize,
            fronts=fronts,
        )  # fmt: skip
        return tapped.for_inference(precision, example.shape[1:]).to(device)

    def rules_of(tapped: TappedEncoder) -> list[ExitRule]:
        inner = tapped.seen[len(fronts) :]
        return [*taught, *build_rules(settings.rule.name, inner, settings.n_clusters, settings.rule.options)]

    def fitted(collected: Collected, tapped: TappedEncoder, rules: list[ExitRule]) -> Cascade:
        return collected.fit(tapped, rules, AcrossExits(exits.patience, exits.ensemble), settings.random_state)

    def timed(cascade: Cascade) -> Cascade:
        return replace(cascade, times=stage_times(cascade.tapped, cascade.rules, cascade.final, example))

    points = exits.points if isinstance(exits.points, str) else list(exits.points)
    assigned: Assigned | None = None
    if settings.front.kind != "none":
        points = [] if points == "auto" else points
        bare = cut([], exits.descriptor, exits.accumulate)
        untaught = sized_fronts(bare, example, settings)
        kept = Kept(source, example.shape[1:], settings.front.side)
        assigned = assign(
            bare, images(order, "fit"), len(source), n_clusters=settings.n_clusters, clusters=settings.clusters,
            seed=settings.random_state, mirror=settings.front.mirror, keep=kept,
        )  # fmt: skip
        fronts, taught, teaching = taught_fronts(untaught, assigned, kept.open(), settings, classes)
    tapped = cut(points, exits.descriptor, exits.accumulate)
    if exits.patience > len(tapped.seen):
        raise InputError(
            f"patience {exits.patience} lets nothing leave at {len(tapped.seen)} exits; lower it or name more exits"
        )
    if assigned is not None and not points:
        across = AcrossExits(exits.patience, exits.ensemble)
        cascade = timed(Cascade.closed(tapped, taught, assigned.final, across))
        used = Provenance(
            assigned.images, assigned.skipped, len(assigned.positions), assigned.n_clustered, teaching=tuple(teaching)
        )
        return _priced(cascade), tuple(fronts), used
    rules = rules_of(tapped)
    used_images: list[np.ndarray] = []
    passes = [noted(images(order, "fit"), used_images)]
    if settings.rule.mirror:
        passes.append(noted(mirrored(images(order, "fit, mirrored")), used_images))
    collected = collect(
        tapped,
        passes,
        len(order),
        rules,
        n_clusters=settings.n_clusters,
        clusters=settings.clusters,
        seed=settings.random_state,
        classes=classes,
        final=assigned.final if assigned else None,
    )
    cascade = timed(fitted(collected, tapped, rules))
    choices = _choices(cascade, settings, images, shaping)
    kept_exits = [i for i, choice in enumerate(choices) if choice.kept]
    if 0 < len(kept_exits) < len(choices):
        assert cascade.times is not None
        times = cascade.times.without(kept_exits)
        collected = collected.at(tapped, kept_exits)
        tapped = cut(
            [choices[i].name for i in kept_exits], [tapped.descriptors[i].kind for i in kept_exits], tapped.accumulate
        )
        cascade = replace(fitted(collected, tapped, rules_of(tapped)), times=times)
    skipped = collected.statistics.skipped
    hashes = SeenImages(used_images).hashes
    used = Provenance(hashes, skipped, collected.n_fit, collected.n_clustered, tuple(choices), tuple(teaching))
    return _priced(cascade), tuple(fronts), used


def _priced(cascade: Cascade) -> Cascade:
    """Where the multiply-adds of the encoder cannot be counted, as many as its measured time is worth by that of the
    fronts."""
    staged, times = cascade.tapped.staged, cascade.times
    if sum(staged.macs) == 0 and times is not None:
        fronts = [d for d in cascade.tapped.descriptors if isinstance(d, Front)]
        rate = sum(front.macs for front in fronts) / times.exit_seconds[: len(fronts)].sum()
        staged.macs = [round(rate * seconds) for seconds in times.stage_seconds]
        staged.macs[-1] = max(1, staged.macs[-1])
    return cascade


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
