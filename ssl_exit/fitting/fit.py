"""From an encoder and images to a model: exits cut and placed, rules fitted, stages timed, thresholds calibrated."""

import copy
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from ssl_exit.cascade.cascade import Cascade, describe
from ssl_exit.data.cache import CachedImages
from ssl_exit.data.hashes import SeenImages, noted
from ssl_exit.data.images import Batch, ImageSource, mirrored
from ssl_exit.data.preprocessing import AnyPreprocessing
from ssl_exit.data.reading import first_images
from ssl_exit.encoders.build import EncoderSpec
from ssl_exit.encoders.tapped import TappedEncoder
from ssl_exit.errors import InputError
from ssl_exit.exits.registry import build_rules
from ssl_exit.exits.rules import ExitRule
from ssl_exit.fitting.calibrate import Read, calibrate, hold_out, logits_per_image, reader, split_held_out, uncertified
from ssl_exit.fitting.count import Collected, collect
from ssl_exit.fitting.cut import Cutter, check_fronts, check_patience, check_repeatable, headed_encoder
from ssl_exit.fitting.front import TaughtFronts, sized_fronts, teach_fronts
from ssl_exit.fitting.n_clusters import IMAGES, choose_n_clusters
from ssl_exit.fitting.place import judged, places_exits
from ssl_exit.fitting.record import record_logits
from ssl_exit.fitting.sample import Clustering
from ssl_exit.model import Model, hash_of_cut
from ssl_exit.provenance import ClusterCount, ExitChoice, Provenance
from ssl_exit.settings import Settings


def fit(
    encoder: nn.Module,
    source: ImageSource,
    settings: Settings,
    preprocessing: AnyPreprocessing | None = None,
    spec: EncoderSpec | None = None,
    classes: np.ndarray | None = None,
    weights: np.ndarray | None = None,
) -> Model:
    """Find final clusters, fit an exit rule at every exit point, and calibrate on images held out by seed.

    Args:
        encoder: images to features; left unchanged.
        source: images.
        settings: all parameters.
        preprocessing: of the images; saved with the model.
        spec: architecture of the encoder, if an `EncoderSpec` built it.
        classes: in the supervised mode, the class of every image, (N,) int64, or None.
        weights: of the images in k-means, (N,), or None.

    Raises:
        InputError: settings, images or an encoder that cannot be used.
    """
    held, fitted = hold_out(len(source), settings)
    encoder = copy.deepcopy(encoder).cpu().eval()
    example = first_images(source, fitted, settings.batch_size).images.cpu()
    shape = tuple(example.shape[1:])
    if settings.clusters.head is not None:
        encoder, settings = headed_encoder(encoder, example, settings)

    images = reader(source, settings, shape)
    counts: list[ClusterCount] = []
    if settings.n_clusters == "auto":
        counts = _cluster_counts(Cutter(encoder, example, settings), images(fitted[:IMAGES], "number of clusters"))
        settings = replace(settings, n_clusters=max(counts, key=lambda one: one.merit).n_clusters)
    clustering = Clustering(settings.k, settings.clusters, settings.random_state, weights)
    parts = split_held_out(held, logits_per_image(settings))
    cut = Cutter(encoder, example, settings)
    points, taught = settings.exits.points, TaughtFronts()
    if points == "auto" and settings.front.kind != "none":
        points = []  # exits behind a front would add work and save nothing (docs/front.md)
    if settings.front.kind != "none":
        bare = cut([], settings.exits.descriptor)
        check_repeatable(encoder, bare, example, settings)
        untaught = sized_fronts(bare, example, settings)
        check_fronts(cut(points, settings.exits.descriptor, settings.exits.accumulate, untaught), settings)
        cache = CachedImages(source, shape, max(shape[1:]) if settings.front.match else settings.front.side)
        taught = teach_fronts(untaught, bare, images(fitted, "fit"), cache, settings, clustering, classes)
        assert taught.assigned is not None
        clustering = replace(clustering, final=taught.assigned.final)
    if len(points):
        cascade, provenance = _with_exits(cut, points, images, fitted, parts[0], taught, clustering, classes)
    else:
        cascade, provenance = _fronts_alone(cut, taught)
    provenance = replace(provenance, counts=tuple(counts))
    model = uncertified(encoder, spec, cascade, settings, preprocessing, shape, provenance, taught.fronts)
    model = calibrate(model, images, parts, model.settings)
    used = model.provenance
    seen = np.union1d(used.images, used.shaped) if used.choices else used.images  # chosen by the images that shape
    used = replace(used, images=seen, skipped=used.skipped | used.calibration_skipped)
    return replace(model, provenance=used)


def _cluster_counts(cut: Cutter, batches: Iterable[Batch]) -> list[ClusterCount]:
    """What n_clusters="auto" chooses from.

    Raises:
        InputError: too few images, or a mode in which there is nothing to choose.
    """
    how = cut.settings.clusters
    if how.supervised:
        raise InputError("in the supervised mode n_clusters is the number of classes; got 'auto'")
    seen = [each.features.cpu() for each in describe(cut([], cut.settings.exits.descriptor), batches)]
    progress = cut.settings.runtime.progress
    features = torch.cat(seen)
    counts = choose_n_clusters(features, spherical=how.spherical, seed=cut.settings.random_state, progress=progress)
    if not counts:
        raise InputError(f"n_clusters='auto' needs at least 40 usable images to fit; there are {len(features)}")
    return counts


def recalibrate(model: Model, source: ImageSource, settings: Settings) -> Model:
    """Set thresholds and certificate anew, from images that the fit did not see (see `calibrate`)."""
    order = np.random.default_rng(settings.random_state).permutation(len(source))
    if hash_of_cut(model.encoder, model.fronts) != model.cut_hash:  # a certificate is about both, weights and what runs
        model = model.recut()
    held = split_held_out(order, logits_per_image(model.settings))
    return calibrate(model, reader(source, settings, model.image_shape), held, settings)


def _fronts_alone(cut: Cutter, taught: TaughtFronts) -> tuple[Cascade, Provenance]:
    """The encoder as one stage behind its fronts."""
    exits, assigned = cut.settings.exits, taught.assigned
    if assigned is None:
        raise InputError('exits names no exit point; use "auto", see list_exits(encoder, example), or set a front')
    tapped = cut([], exits.descriptor, exits.accumulate, taught.fronts)
    cascade = cut.timed(Cascade.closed(tapped, taught.rules, assigned.final, cut.across))
    n_fit = len(assigned.positions)
    used = assigned.images, assigned.skipped, n_fit, assigned.n_clustered
    return cascade, Provenance(*used, teaching=taught.teaching, inertia=assigned.inertia)


def _with_exits(
    cut: Cutter,
    points: str | Sequence[str],
    images: Read,
    order: np.ndarray,
    shaping: np.ndarray,
    taught: TaughtFronts,
    clustering: Clustering,
    classes: np.ndarray | None,
) -> tuple[Cascade, Provenance]:
    """Final clusters and a rule at every exit; with exits="auto" those exits that do not pay are left out again."""
    settings, fronts = cut.settings, taught.fronts
    exits, rule = settings.exits, settings.rule

    def rules_of(tapped: TappedEncoder) -> list[ExitRule]:
        inside = tapped.seen[len(fronts) :]
        return [*taught.rules, *build_rules(rule.name, inside, settings.k, rule.options)]

    def fitted(collected: Collected, tapped: TappedEncoder, rules: list[ExitRule]) -> Cascade:
        return collected.fit(tapped, rules, cut.across, settings.random_state)

    tapped = cut(points, exits.descriptor, exits.accumulate, fronts)
    check_patience(settings, len(tapped.seen))
    if not fronts:
        check_repeatable(cut.encoder, tapped, cut.example, settings)
    rules = rules_of(tapped)
    hashes: list[np.ndarray] = []
    passes = [noted(images(order, "fit"), hashes)]
    if rule.mirror:
        passes.append(noted(mirrored(images(order, "fit, mirrored")), hashes))
    collected = collect(tapped, passes, len(order), rules, clustering, classes)
    cascade = cut.timed(fitted(collected, tapped, rules))
    choices: list[ExitChoice] = []
    if places_exits(settings) and len(shaping):
        choices = judged(cascade, record_logits(cascade, images(shaping, "place exits"))[0], settings)
    kept = [i for i, choice in enumerate(choices) if choice.kept]
    if 0 < len(kept) < len(choices):
        assert cascade.times is not None
        times = cascade.times.without(kept)
        collected = collected.at(tapped, kept)
        tapped = cut.only(tapped, kept)
        cascade = fitted(collected, tapped, rules_of(tapped)).timed(times)
    n_sample, inertia = collected.n_clustered, collected.inertia
    if taught.assigned:
        n_sample, inertia = taught.assigned.n_clustered, taught.assigned.inertia
    used = SeenImages(hashes).hashes, collected.statistics.skipped, collected.n_fit, n_sample
    return cascade, Provenance(*used, tuple(choices), taught.teaching, inertia=inertia)
