"""From an encoder and images to a model: exits cut and placed, rules fitted, stages timed, thresholds calibrated."""

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from ssl_exit.cascade.cascade import Cascade, describe
from ssl_exit.cascade.times import stage_times
from ssl_exit.data.cache import CachedImages
from ssl_exit.data.hashes import SeenImages, noted
from ssl_exit.data.images import Batch, ImageSource, mirrored
from ssl_exit.data.preprocessing import AnyPreprocessing
from ssl_exit.data.reading import first_images
from ssl_exit.encoders.build import EncoderSpec
from ssl_exit.encoders.front import FrontDescriptor
from ssl_exit.encoders.head import with_head
from ssl_exit.encoders.inference import usable_device
from ssl_exit.encoders.opaque import features_of
from ssl_exit.encoders.repeatable import check_repeatable
from ssl_exit.encoders.stages import WIDEST
from ssl_exit.encoders.tapped import TappedEncoder
from ssl_exit.errors import InputError
from ssl_exit.exits.across import AcrossExits
from ssl_exit.exits.certificate import SettingCounts, certify
from ssl_exit.exits.registry import build_rules
from ssl_exit.exits.rules import ExitRule
from ssl_exit.exits.thresholds import Recorded
from ssl_exit.fitting.calibrate import Read, calibrate, hold_out, logits_per_image, reader, split_held_out, work
from ssl_exit.fitting.count import Collected, collect
from ssl_exit.fitting.front import TaughtFronts, sized_fronts, teach_fronts
from ssl_exit.fitting.n_clusters import IMAGES, choose_n_clusters
from ssl_exit.fitting.place import choose
from ssl_exit.fitting.record import fit_temperatures, record_logits
from ssl_exit.fitting.sample import Clustering
from ssl_exit.model import Model, hash_of_cut
from ssl_exit.provenance import ClusterCount, ExitChoice, Provenance
from ssl_exit.settings import Settings


def fit(
    encoder: nn.Module,
    source: ImageSource,
    settings: Settings,
    preprocessing: AnyPreprocessing | None = None,
    classes: np.ndarray | None = None,
    spec: EncoderSpec | None = None,
    weights: np.ndarray | None = None,
) -> Model:
    """Find final clusters, fit an exit rule at every exit point, and calibrate on images held out by seed.

    Args:
        encoder: images to features; left unchanged.
        source: images.
        settings: all parameters.
        preprocessing: of the images; saved with the model.
        classes: in the supervised mode, the class of every image, (N,) int64, or None.
        spec: architecture of the encoder, if an `EncoderSpec` built it.
        weights: of the images in k-means, (N,), or None.

    Raises:
        InputError: settings, images or an encoder that cannot be used.
    """
    held, fitted = hold_out(len(source), settings)
    encoder = copy.deepcopy(encoder).cpu().eval()
    example = first_images(source, fitted, settings.batch_size).images.cpu()
    shape = tuple(example.shape[1:])
    if settings.clusters.head is not None:
        encoder, settings = _with_head(encoder, example, settings)

    images = reader(source, settings, shape)
    counts: list[ClusterCount] = []
    if settings.n_clusters == "auto":
        counts = _cluster_counts(_Cutter(encoder, example, settings), images(fitted[:IMAGES], "number of clusters"))
        settings = replace(settings, n_clusters=max(counts, key=lambda one: one.merit).n_clusters)
    clustering = Clustering(settings.k, settings.clusters, settings.random_state, weights)
    parts = split_held_out(held, logits_per_image(settings))
    cut = _Cutter(encoder, example, settings)
    points, taught = settings.exits.points, TaughtFronts()
    if points == "auto" and settings.front.kind != "none":
        points = []  # exits behind a front would add work and save nothing (docs/front.md)
    if settings.front.kind != "none":
        bare = cut([], settings.exits.descriptor)
        _check_repeatable(encoder, bare, example, settings)
        untaught = sized_fronts(bare, example, settings)
        _check_fronts(cut(points, settings.exits.descriptor, settings.exits.accumulate, untaught), settings)
        cache = CachedImages(source, shape, max(shape[1:]) if settings.front.match else settings.front.side)
        taught = teach_fronts(untaught, bare, images(fitted, "fit"), cache, settings, clustering, classes)
        assert taught.assigned is not None
        clustering = replace(clustering, final=taught.assigned.final)
    if len(points):
        cascade, provenance = _with_exits(cut, points, images, fitted, parts[0], taught, clustering, classes)
    else:
        cascade, provenance = _fronts_alone(cut, taught)
    front, clusters = replace(settings.front, network=None), replace(settings.clusters, centroids=None)
    settings = replace(settings, front=front, clusters=clusters)  # the model has its own
    provenance = replace(provenance, counts=tuple(counts))
    path = cascade.thresholds[None]
    nothing = SettingCounts.count(path, Recorded.empty(len(cascade.rules)))
    _, certificate = certify(path, nothing, cascade.costs, settings.max_disagreement, settings.confidence)
    model = Model(
        encoder, spec, cascade, settings, preprocessing, shape, certificate, path, np.full(1, np.nan), provenance,
        hash_of_cut(encoder, taught.fronts), taught.fronts,
    )  # fmt: skip
    model = calibrate(model, images, parts, settings)
    used = model.provenance
    seen = np.union1d(used.images, used.shaped) if used.choices else used.images  # chosen by the images that shape
    used = replace(used, images=seen, skipped=used.skipped | used.calibration_skipped)
    return replace(model, provenance=used)


def _with_head(encoder: nn.Module, example: Tensor, settings: Settings) -> tuple[nn.Module, Settings]:
    """The encoder with the user's head, whose labels are the classes of the supervised mode."""
    n_labels = None if settings.n_clusters == "auto" else settings.n_clusters
    headed = with_head(encoder, settings.clusters.head, n_labels)
    with torch.inference_mode(), torch.random.fork_rng(devices=[]):
        n_logits = features_of(headed(example.clone()), example).shape[1]
    clusters = replace(settings.clusters, supervised=True, head=None)
    return headed, replace(settings, n_clusters=n_logits if n_labels is None else n_labels, clusters=clusters)


def _cluster_counts(cut: "_Cutter", batches: Iterable[Batch]) -> list[ClusterCount]:
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


def _check_repeatable(encoder: nn.Module, tapped: TappedEncoder, example: Tensor, settings: Settings) -> None:
    def features(images: Tensor) -> Tensor:
        return tapped.final_features(tapped.enter(images))

    def own_features(images: Tensor) -> Tensor:
        return tapped.output(features_of(encoder(images), images))

    with torch.random.fork_rng(devices=[]):  # an encoder that draws random numbers draws from the global generator
        check_repeatable(encoder, features, own_features, example, settings.runtime.precision)


def _check_fronts(tapped: TappedEncoder, settings: Settings) -> None:
    """Raise InputError, before fronts are taught, where exits behind them cannot be what was asked for."""
    _check_patience(settings, len(tapped.seen))
    if settings.exits.accumulate and not tapped.accumulate and len(tapped.fronts) > 1:
        raise InputError(
            f"descriptors of the exits have more than {WIDEST} entries and cannot accumulate; with several fronts set "
            'descriptor="average", name fewer exits, or set accumulate=False'
        )


def _check_patience(settings: Settings, n_exits: int) -> None:
    if settings.exits.patience > n_exits:
        raise InputError(
            f"patience {settings.exits.patience} lets nothing leave at {n_exits} exits; lower it or name more exits"
        )


@dataclass(frozen=True)
class _Cutter:
    """Cuts the encoder into stages, with descriptors, on the device in use."""

    encoder: nn.Module
    example: Tensor
    settings: Settings

    def __call__(
        self,
        points: str | Sequence[str],
        descriptor: str | Sequence[str],
        accumulate: bool = True,
        fronts: Sequence[FrontDescriptor] = (),
    ) -> TappedEncoder:
        tapped = TappedEncoder.build(
            self.encoder,
            points,
            self.example,
            descriptor=descriptor,
            accumulate=accumulate,
            normalize=self.settings.exits.normalize,
            fronts=fronts,
        )
        ready = tapped.for_inference(self.settings.runtime.precision, self.example.shape[1:])
        return ready.to(usable_device(self.settings.device))

    @property
    def across(self) -> AcrossExits:
        return AcrossExits(self.settings.exits.patience, self.settings.exits.ensemble)

    def timed(self, cascade: Cascade) -> Cascade:
        """With measured times; where the multiply-adds of the encoder cannot be counted, as many as its time is worth
        by that of the fronts."""
        times = stage_times(cascade.tapped, cascade.rules, cascade.final, self.example)
        staged = cascade.tapped.staged
        fronts = [d for d in cascade.tapped.descriptors if isinstance(d, FrontDescriptor)]
        if sum(staged.macs) == 0 and fronts:
            rate = max(1, sum(front.macs for front in fronts)) / times.exit_seconds[: len(fronts)].sum()
            staged.macs = [*staged.macs[:-1], max(1, round(rate * times.stage_seconds[-1]))]
        return cascade.timed(times)


def _fronts_alone(cut: _Cutter, taught: TaughtFronts) -> tuple[Cascade, Provenance]:
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
    cut: _Cutter,
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
    _check_patience(settings, len(tapped.seen))
    if not fronts:
        _check_repeatable(cut.encoder, tapped, cut.example, settings)
    rules = rules_of(tapped)
    hashes: list[np.ndarray] = []
    passes = [noted(images(order, "fit"), hashes)]
    if rule.mirror:
        passes.append(noted(mirrored(images(order, "fit, mirrored")), hashes))
    collected = collect(tapped, passes, len(order), rules, clustering, classes)
    cascade = cut.timed(fitted(collected, tapped, rules))
    choices = _choices(cascade, settings, images, shaping)
    kept = [i for i, choice in enumerate(choices) if choice.kept]
    if 0 < len(kept) < len(choices):
        assert cascade.times is not None
        times = cascade.times.without(kept)
        collected = collected.at(tapped, kept)
        tapped = cut([choices[i].name for i in kept], [tapped.descriptors[i].kind for i in kept], tapped.accumulate)
        cascade = fitted(collected, tapped, rules_of(tapped)).timed(times)
    n_sample, inertia = collected.n_clustered, collected.inertia
    if taught.assigned:
        n_sample, inertia = taught.assigned.n_clustered, taught.assigned.inertia
    used = SeenImages(hashes).hashes, collected.statistics.skipped, collected.n_fit, n_sample
    return cascade, Provenance(*used, tuple(choices), taught.teaching, inertia=inertia)


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
    return choose(names, recorded, stage, own, settings.k, settings.max_disagreement)
