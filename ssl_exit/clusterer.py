"""ExitClusterer: the estimator users hold."""

import copy
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator
from sklearn.exceptions import NotFittedError
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn
from tqdm.auto import tqdm

from ssl_exit.cascade import Cascade, ExitResult
from ssl_exit.data.images import Batch, ImageData, ImageSource, open_images
from ssl_exit.data.preprocessing import Preprocessing
from ssl_exit.encoders.build import EncoderSpec
from ssl_exit.encoders.graph import ExitPoint, as_module
from ssl_exit.encoders.tapped import TappedEncoder
from ssl_exit.errors import InputError
from ssl_exit.exits import centroid, means, own_clusters  # noqa: F401  (registers the rules)
from ssl_exit.exits.certificate import certify
from ssl_exit.exits.kmeans import FinalClusters
from ssl_exit.exits.rules import ExitRule, rule_named
from ssl_exit.exits.statistics import ClusterStatistics
from ssl_exit.exits.thresholds import Recorded, threshold_path, trade_off
from ssl_exit.measure.evaluation import Evaluation, evaluate
from ssl_exit.measure.timing import stage_seconds

SAMPLE = 10_000  # images at least whose descriptors fit() holds in memory: for k-means and rules that need them
SAMPLE_BYTES = 1 << 29
SHAPING = 1 / 3  # share of the held-out images that shape the threshold path; the others certify


class ExitClusterer(BaseEstimator):
    """Cluster images with an encoder, computing for each only as many layers as it needs.

    Parameters:
        encoder: images to features: a module (it is copied, never changed); a list of modules that are its
            stages, for networks torch.fx cannot trace; or an EncoderSpec, which load() can build again.
        n_clusters: K, the number of final clusters.
        exits: names of exit points ("layer2" means its last node), or "auto": at most eight, spread evenly
            over the cost.
        rule: how an exit decides: "centroid", "euclidean", "e2cm", "kmeans" or "prototypes".
        max_disagreement: share of images, in (0, 1), whose label may differ from the whole encoder's.
        confidence: in (0, 1), with which that must hold (see `Certificate`); 0.5 asks for no safety margin.
        batch_size: images a stage runs on at a time.
        device: "auto" (CUDA where there is one), or what torch.device takes.
        random_state: seed of the hold-out split, of the order of images in fit, and of k-means.
        descriptor: "auto", "average", "pyramid" or "tokens" (see `TappedEncoder.build`).
        accumulate: whether an exit also sees the descriptors of earlier exits.
        normalize: divide descriptors by their L2 norm.
        spherical: compare final features by direction (cosine) instead of Euclidean distance.
        preprocessing: for folders and uint8 images; float tensors are taken as they are.
        holdout: share of the images that fit() keeps for calibrate(); with 0 nothing exits early until
            calibrate(data) is called.
        num_workers: processes that decode images.
        progress: show progress bars on a terminal.

    Attributes:
        exit_points_: list of ExitPoint.
        cluster_centers_: final centroids, (K, F) float32.
        certificate_: what calibrate() showed.
        threshold_path_: settings that calibrate() considered, (S, E, K); not saved.
        skipped_: position and reason of images that fit() could not use.
        n_fit_: images behind the statistics; n_sample_: of those, images that k-means saw.
        stage_seconds_, exit_seconds_: measured seconds an image of each stage and of each exit, (E + 1,) each.

    Notes:
        fit() makes one pass. It holds in memory, beside one batch and whatever the data hold themselves: the
        descriptors and final features of a random sample (10,000 images, or 256 a cluster if that is more, up
        to 512 MB), on which k-means runs; one D x D scatter of the accumulated descriptor; and labels and
        scores of the held-out images.

    Examples:
        >>> import torch
        >>> from ssl_exit import ExitClusterer
        >>> encoder = torch.nn.Sequential(
        ...     torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 8, 3), torch.nn.ReLU(),
        ...     torch.nn.Conv2d(8, 8, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
        >>> images = torch.rand(600, 3, 12, 12)
        >>> c = ExitClusterer(encoder, n_clusters=3, max_disagreement=0.1).fit(images)
        >>> c.predict(images).shape
        (600,)
    """

    def __init__(
        self,
        encoder: nn.Module | Sequence[nn.Module] | EncoderSpec,
        n_clusters: int = 10,
        exits: str | Sequence[str] = "auto",
        rule: str = "centroid",
        max_disagreement: float = 0.02,
        confidence: float = 0.95,
        batch_size: int = 256,
        device: str = "auto",
        random_state: int = 0,
        *,
        descriptor: str = "auto",
        accumulate: bool = True,
        normalize: bool = False,
        spherical: bool = True,
        preprocessing: Preprocessing | None = None,
        holdout: float = 0.2,
        num_workers: int = 0,
        progress: bool = True,
    ) -> None:
        self.encoder = encoder
        self.n_clusters = n_clusters
        self.exits = exits
        self.rule = rule
        self.max_disagreement = max_disagreement
        self.confidence = confidence
        self.batch_size = batch_size
        self.device = device
        self.random_state = random_state
        self.descriptor = descriptor
        self.accumulate = accumulate
        self.normalize = normalize
        self.spherical = spherical
        self.preprocessing = preprocessing
        self.holdout = holdout
        self.num_workers = num_workers
        self.progress = progress

    def fit(self, data: ImageData, y: None = None) -> "ExitClusterer":
        """Find final clusters, fit an exit rule at every exit point, and calibrate on images held out by seed.

        Args:
            data: images (see `open_images`); never labels.
            y: ignored, as scikit-learn has it.

        Raises:
            InputError: parameters, images or an encoder that cannot be used; nothing fitted before is lost.
        """
        self._check_parameters()
        source = self._open(data)
        order = np.random.default_rng(self.random_state).permutation(len(source))
        held = order[: round(self.holdout * len(source))]
        fitted = _Fit(self, source, order[len(held) :]).cascade_with_state()
        self.__dict__.update(fitted)
        self._calibrate(source, held)
        return self

    def calibrate(
        self, data: ImageData, max_disagreement: float | None = None, confidence: float | None = None
    ) -> "ExitClusterer":
        """Set thresholds and certificate anew, from images that fit() did not see.

        Args:
            data: images like those to come, unlabelled; one third shapes thresholds, two thirds certify.
            max_disagreement: a new value; the one in use if None.
            confidence: a new value; the one in use if None.
        """
        self._check_fitted()
        self.max_disagreement = self.max_disagreement if max_disagreement is None else max_disagreement
        self.confidence = self.confidence if confidence is None else confidence
        self._check_parameters()
        source = self._open(data)
        self._calibrate(source, np.random.default_rng(self.random_state).permutation(len(source)))
        return self

    def predict(self, data: ImageData) -> np.ndarray:
        """Final clusters computed with early exits, (N,) int64 in input order; -1 where an image is unusable."""
        return self.run(data).labels

    def run(self, data: ImageData) -> ExitResult:
        """Labels, exits, scores and cost of every image, (N,) each, in input order."""
        self._check_fitted()
        source = self._open(data)
        batches = self._batches(source, np.arange(len(source)), "cluster")
        result = self.cascade_.run(batches, len(source), self.batch_size)
        _warn_of(result.skipped, len(source))
        return result

    def predict_full(self, data: ImageData) -> np.ndarray:
        """Labels of the whole encoder, (N,) int64; -1 where an image is unusable."""
        self._check_fitted()
        source = self._open(data)
        batches = self._batches(source, np.arange(len(source)), "whole encoder")
        labels, skipped = self.cascade_.full(batches, len(source))
        _warn_of(skipped, len(source))
        return labels

    def fit_predict(self, data: ImageData, y: None = None) -> np.ndarray:
        """`fit(data)`, then `predict(data)`."""
        return self.fit(data).predict(data)

    def evaluate(self, data: ImageData, targets: np.ndarray | None = None) -> Evaluation:
        """Early exit beside the whole encoder on the same images: agreement, cost, and metrics.

        Args:
            data: images that neither fit() nor calibrate() saw.
            targets: ground truth, (N,) int, for ACC, NMI and ARI. Used here only.
        """
        self._check_fitted()
        source = self._open(data)
        if targets is not None and np.shape(targets) != (len(source),):
            raise InputError(f"targets must have shape ({len(source)},), one for each image; got {np.shape(targets)}")
        batches = self._batches(source, np.arange(len(source)), "evaluate")
        found = evaluate(self.cascade_, batches, len(source), self.batch_size, targets)
        _warn_of(found.result.skipped, len(source))
        return found

    def trade_off(self, data: ImageData) -> tuple[np.ndarray, np.ndarray]:
        """Cost and agreement on these images of every setting that calibrate() considered, (S,) and (S,)."""
        self._check_fitted()
        if not hasattr(self, "threshold_path_"):
            raise NotFittedError("a loaded model keeps its thresholds but not the path to them; call calibrate(data)")
        source = self._open(data)
        recorded = self.cascade_.record(self._batches(source, np.arange(len(source)), "record"), len(source))
        return trade_off(self.threshold_path_, recorded, self.cascade_.costs)

    def save(self, folder: str | Path) -> None:
        """Write the model into a new folder, or over a model that is there (see `ssl_exit.load`)."""
        from ssl_exit.storage import save

        self._check_fitted()
        save(self, Path(folder))

    @property
    def exit_points_(self) -> list[ExitPoint]:
        self._check_fitted()
        return self.cascade_.tapped.staged.exit_points

    @property
    def exit_names_(self) -> list[str]:
        """Names for the numbers in ExitResult.exits: the exit points, and "end"."""
        return [*(point.name for point in self.exit_points_), "end"]

    @property
    def cluster_centers_(self) -> np.ndarray:
        self._check_fitted()
        return self.cascade_.final.centroids.cpu().numpy()

    def _calibrate(self, source: ImageSource, held: np.ndarray) -> None:
        """Shape a threshold path on some of the held-out images, and walk it on the others."""
        shaping, certifying = np.split(held, [round(SHAPING * len(held))])
        recorded = self._record(source, shaping)
        costs = self.cascade_.costs
        self.threshold_path_ = path = threshold_path(recorded, costs, self.n_clusters)
        proof = self.cascade_.record(self._batches(source, certifying, "certify"), len(certifying))
        thresholds, self.certificate_ = certify(path, proof, self.max_disagreement, self.confidence)
        self.cascade_.thresholds.copy_(torch.from_numpy(thresholds))
        if len(held) and self.certificate_.early == 0:
            warnings.warn(str(self.certificate_), stacklevel=3)

    def _record(self, source: ImageSource, shaping: np.ndarray) -> Recorded:
        """Labels and scores at every exit, after each rule's temperature is fitted to the same images."""
        cascade = self.cascade_
        n, e = len(shaping), len(cascade.rules)
        logits = torch.full((n, e, self.n_clusters), torch.nan)
        final = torch.full((n,), -1)
        at = 0
        with torch.inference_mode():
            for batch in self._batches(source, shaping, "calibrate"):
                if len(batch.indices) == 0:
                    continue
                rows = slice(at, at := at + len(batch.indices))
                descriptors, features = cascade.tapped(batch.images.to(cascade.thresholds.device))
                final[rows] = cascade.final(features).cpu()
                for i, (rule, columns) in enumerate(zip(cascade.exit_rules, cascade.tapped.columns, strict=True)):
                    logits[rows, i] = rule.logits(descriptors[:, columns]).cpu()
        good = (final >= 0) & logits.isfinite().flatten(1).all(1)
        logits, final = logits[good], final[good]
        labels, scores = torch.zeros(len(final), e, dtype=torch.int64), torch.zeros(len(final), e)
        for i, rule in enumerate(cascade.exit_rules):
            if len(final):
                rule.fit_temperature(logits[:, i], final)
                labels[:, i], scores[:, i] = copy.deepcopy(rule).cpu().decide(logits[:, i])
        return Recorded(labels.numpy(), scores.numpy(), final.numpy())

    def _open(self, data: ImageData) -> ImageSource:
        return open_images(data, self.preprocessing, self.num_workers)

    def _batches(self, source: ImageSource, order: np.ndarray, what: str) -> Iterator[Batch]:
        hidden = None if self.progress else True  # None: hidden where there is no terminal
        with tqdm(total=len(order), desc=what, unit="img", disable=hidden) as bar:
            for batch in source.batches(order, self.batch_size):
                yield batch
                bar.update(len(batch.indices) + len(batch.skipped))

    def _check_fitted(self) -> None:
        try:
            check_is_fitted(self, "cascade_")
        except NotFittedError:
            raise NotFittedError("this ExitClusterer is not fitted yet; call fit(data) first") from None

    def _check_parameters(self) -> None:
        rule_named(self.rule)
        for name, least in (("n_clusters", 1), ("batch_size", 1)):
            value = getattr(self, name)
            if not isinstance(value, (int, np.integer)) or value < least:
                raise InputError(f"{name} must be a whole number >= {least}; got {value!r}")
        for name in ("max_disagreement", "confidence"):
            value = getattr(self, name)
            if not 0 < value < 1:
                raise InputError(f"{name} must lie between 0 and 1; got {value!r}")
        if not 0 <= self.holdout < 1:
            raise InputError(f"holdout must be at least 0 and below 1; got {self.holdout!r}")

    def _device(self) -> torch.device:
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return torch.device(self.device)


class _Fit:
    """One pass over the images: a sample for k-means first, then statistics as they stream by."""

    def __init__(self, clusterer: ExitClusterer, source: ImageSource, order: np.ndarray) -> None:
        self.params = clusterer
        self.source, self.order = source, order
        self.device = clusterer._device()
        self.skipped: dict[int, str] = {}

    def cascade_with_state(self) -> dict[str, Any]:
        """The fitted cascade, and what else fit() remembers."""
        p = self.params
        example = self._example()
        spec = p.encoder if isinstance(p.encoder, EncoderSpec) else None
        given = p.encoder.build() if isinstance(p.encoder, EncoderSpec) else as_module(p.encoder)
        encoder = copy.deepcopy(given).eval()
        tapped = TappedEncoder.build(
            encoder, p.exits, example, descriptor=p.descriptor, accumulate=p.accumulate, normalize=p.normalize
        )
        tapped = tapped.eval().to(self.device)
        rules = [rule_named(p.rule)(dim, p.n_clusters) for dim in tapped.seen]
        final, statistics, sample, labels = self._collect(tapped, rules)
        for rule, columns, seen in zip(rules, tapped.columns, statistics, strict=True):
            rule.fit(seen, sample[:, columns], labels, p.random_state)
        cascade = Cascade(tapped, rules, final).to(self.device)
        stages, exits = stage_seconds(cascade, example)
        _warn_of(self.skipped, len(self.order))
        return {
            "cascade_": cascade,
            "encoder_": encoder,
            "spec_": spec,
            "image_shape_": tuple(example.shape[1:]),
            "stage_seconds_": stages,
            "exit_seconds_": exits,
            "skipped_": self.skipped,
            "n_fit_": int(statistics[0].counts.sum()),
            "n_sample_": len(sample),
        }

    def _example(self) -> Tensor:
        """The first batch with a usable image."""
        reason = "there are none"
        for batch in self.source.batches(self.order, self.params.batch_size):
            if len(batch.indices):
                return batch.images
            reason = next(iter(batch.skipped.values()))
        raise InputError(f"none of the {len(self.order)} images to fit on can be read; for example: {reason}")

    def _collect(
        self, tapped: TappedEncoder, rules: list[ExitRule]
    ) -> tuple[FinalClusters, list[ClusterStatistics], Tensor, Tensor]:
        p = self.params
        scatter = rules[0].needs_scatter
        held: tuple[Tensor, Tensor] | None = None
        filled, final = 0, None
        statistics: list[ClusterStatistics] = []

        def count(descriptors: Tensor, labels: Tensor) -> None:
            parts = [slice(None)] if tapped.accumulate else tapped.columns
            for part, into in zip(parts, statistics, strict=True):
                into.add(descriptors[:, part], labels)

        for descriptors, features in self._described(tapped):
            if held is None:
                width = 4 * (descriptors.shape[1] + features.shape[1])
                room = min(len(self.order), max(SAMPLE, 256 * p.n_clusters), SAMPLE_BYTES // width)
                held = (torch.empty(room, descriptors.shape[1]), torch.empty(room, features.shape[1]))
                dims = [tapped.dim] if tapped.accumulate else tapped.seen
                statistics = [ClusterStatistics.empty(p.n_clusters, dim, scatter=scatter) for dim in dims]
            took = min(len(descriptors), len(held[0]) - filled)
            held[0][filled : filled + took], held[1][filled : filled + took] = descriptors[:took], features[:took]
            filled += took
            if final is None and filled == len(held[0]):
                final = self._cluster(held[1])
                count(held[0], final(held[1]))
            if final is not None and took < len(descriptors):
                count(descriptors[took:], final(features[took:]))
        if held is None:
            raise InputError("no image has finite features: the encoder or the images are broken")
        sample, features = held[0][:filled], held[1][:filled]
        if final is None:  # fewer usable images than the sample has room for
            final = self._cluster(features)
            count(sample, final(features))
        if tapped.accumulate:
            statistics = [statistics[0].leading(dim) for dim in tapped.seen]
        return final, statistics, sample, final(features)

    def _cluster(self, features: Tensor) -> FinalClusters:
        return FinalClusters.fit(
            features, self.params.n_clusters, spherical=self.params.spherical, seed=self.params.random_state
        )

    def _described(self, tapped: TappedEncoder) -> Iterator[tuple[Tensor, Tensor]]:
        """Descriptors and final features of the images, batch by batch, without those that are not finite."""
        with torch.inference_mode():
            for batch in self.params._batches(self.source, self.order, "fit"):
                self.skipped.update(batch.skipped)
                if len(batch.indices) == 0:
                    continue
                descriptors, features = (t.cpu() for t in tapped(batch.images.to(self.device)))
                good = descriptors.isfinite().all(1) & features.isfinite().all(1)
                bad = batch.indices[~good].tolist()
                self.skipped.update(dict.fromkeys(bad, "pixels or features are NaN or infinite"))
                yield descriptors[good], features[good]


def _warn_of(skipped: dict[int, str], n: int) -> None:
    if skipped:
        position, reason = next(iter(skipped.items()))
        warnings.warn(
            f"{len(skipped)} of {n} images could not be used; the first: position {position} ({reason}). They are "
            "listed in `skipped`",
            stacklevel=3,
        )
