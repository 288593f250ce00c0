"""ExitClusterer: the estimator users hold."""

import copy
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClusterMixin
from sklearn.exceptions import NotFittedError
from torch import nn

from ssl_exit.building import build, cut_anew
from ssl_exit.calibration import calibrate, refuse_fitted, split_held_out, work
from ssl_exit.data.images import Batch, ImageData, ImageSource, open_images
from ssl_exit.data.preprocessing import Preprocessing
from ssl_exit.data.reading import parts, read, warn_of_skipped
from ssl_exit.drift import DriftAudit
from ssl_exit.encoders.build import EncoderSpec
from ssl_exit.encoders.graph import ExitPoint, as_module
from ssl_exit.encoders.stages import MOST_EXITS
from ssl_exit.engine import ExitResult
from ssl_exit.errors import InputError
from ssl_exit.exits.certificate import Certificate
from ssl_exit.exits.final import FinalClusters
from ssl_exit.exits.registry import rule_classes
from ssl_exit.exits.thresholds import trade_off
from ssl_exit.fingerprint import SeenImages, fingerprint, module_hash
from ssl_exit.fitting import first_images
from ssl_exit.measure.evaluation import Evaluation, evaluate
from ssl_exit.measure.explanation import Explanation, explain
from ssl_exit.parameters import FIXED, check_parameters, checked_classes, checked_targets
from ssl_exit.timing import StageTimes

PART = 64  # batches whose results stream() gives at a time


class ExitClusterer(ClusterMixin, BaseEstimator):
    """Cluster images with an encoder, computing for each only as many layers as it needs.

    Parameters:
        encoder: images to features: a module (it is copied, never changed); a list of modules that are its
            stages, for networks torch.fx cannot trace; or an EncoderSpec, which load() can build again.
        n_clusters: K, the number of final clusters.
        exits: names of exit points ("layer2" means its last node), or "auto": of at most eight, spread evenly
            over the cost, those that pay for themselves on held-out images (see `exit_choices_`). All stay where
            nothing is held out, and with patience or ensembling, where exits depend on each other.
        rule: how an exit decides (docs/rules.md): "centroid", "kmeans", "prototypes", "euclidean", "e2cm",
            "e2cm_released", "mahalanobis", "sdn", "branchynet", "eenet", "mlp", or two joined as "centroid+sdn".
        max_disagreement: share of images, in (0, 1), whose label may differ from the whole encoder's.
        confidence: in (0, 1), with which that must hold; 0.5 asks for no safety margin.
        batch_size: images a stage runs on at a time.
        device: "auto" (CUDA where there is one), or what torch.device takes.
        random_state: seed of the hold-out split, of the order of images in fit, and of k-means.
        rule_options: keyword arguments of the rule, such as {"hidden": 64}.
        thresholds: "search": a threshold for every exit and cluster that minimises cost; "exit": one for every exit;
            "cbt": one for every cluster, class based thresholding.
        guarantee: what is certified (docs/certificates.md): "overall"; "cluster", the same for the images of every
            final cluster; "exit", for the images that leave at every exit with every label; or "expectation".
        audit: share of the images that leave early which predict() takes to the end all the same, to see whether the
            certificate still holds (see `DriftAudit`); 0: none. So do run() and stream().
        false_alarm: probability of a false alarm of that audit, however long it goes on.
        cost: what thresholds and exits="auto" save: "macs", or "time": stages as measured in fit().
        precision: "float32", or "bfloat16": encoder and all its answers, those of the whole encoder too, in bfloat16;
            faster where the hardware has it (evaluate() says how many labels differ from float32).
        compile: run full batches through torch.compile; worth it for many images. Falls back with a warning.
        patience: leave only where so many consecutive exits agree; 1 = off (see `AcrossExits`).
        ensemble: let an exit answer with the geometric mean of all exits' probabilities so far.
        supervised: the encoder gives one logit a class (n_clusters of them), and exits learn the classes given as
            `y` to fit(), or the encoder's own answers without them.
        mirror: fit rules on left-right mirrored images too (k-means and the held-out images stay as they are); takes
            a second pass.
        descriptor: "auto", "average", "pyramid", "tokens" or "flatten" (see `TappedEncoder.build`).
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
        certificate_: what calibrate() showed; `void` once thresholds, rules, preprocessing or weights differ from then.
        fit_images_: hashes of the images that rules were fitted to or exits chosen by; calibrate() refuses them.
        audit_: the DriftAudit of all that predict() and run() saw since calibrate() or load(); None without one.
        exit_choices_: with exits="auto", why each candidate was kept or left out.
        threshold_path_: settings that calibrate() considered, (S, E, K), and path_disagreement_: what share of the
            certifying images each of them gives another label, (S,). Both are saved thinned.
        skipped_: position and reason of images that fit() could not use.
        n_fit_: images behind the statistics, mirrored ones counted too; n_sample_: of those, images that k-means saw.
        times_: measured seconds of stages and exits at several batch sizes (see `StageTimes`).
        encoder_: a copy of the encoder, in float32 on the CPU, of which another one, made fast, is run; spec_: its
            EncoderSpec, if it was given as one.

    Notes:
        fit() passes once over the images (twice with `mirror`), after timing stages on one batch. It holds in memory,
        beside one batch and whatever the data hold themselves: the descriptors and final features of a random sample
        (10,000 images, or 256 a cluster if that is more; 50,000 for trained heads, with their soft assignments; up to
        512 MB of descriptors), on whose first part k-means runs; one D x D scatter of the accumulated descriptor;
        logits of the held-out images that shape thresholds (up to 256 MB), and labels and scores of the others.

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
        rule_options: dict[str, Any] | None = None,
        thresholds: str = "search",
        guarantee: str = "overall",
        audit: float = 0.0,
        false_alarm: float = 0.01,
        cost: str = "macs",
        precision: str = "float32",
        compile: bool = False,
        patience: int = 1,
        ensemble: bool = False,
        supervised: bool = False,
        mirror: bool = False,
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
        self.rule_options = rule_options
        self.thresholds = thresholds
        self.guarantee = guarantee
        self.audit = audit
        self.false_alarm = false_alarm
        self.cost = cost
        self.precision = precision
        self.compile = compile
        self.patience = patience
        self.ensemble = ensemble
        self.supervised = supervised
        self.mirror = mirror
        self.descriptor = descriptor
        self.accumulate = accumulate
        self.normalize = normalize
        self.spherical = spherical
        self.preprocessing = preprocessing
        self.holdout = holdout
        self.num_workers = num_workers
        self.progress = progress

    def fit(self, data: ImageData, y: np.ndarray | None = None) -> "ExitClusterer":
        """Find final clusters, fit an exit rule at every exit point, and calibrate on images held out by seed.

        Args:
            data: images (see `open_images`); never labels.
            y: classes, (N,) int, in the supervised mode; ignored otherwise, as scikit-learn has it.

        Raises:
            InputError: parameters, images or an encoder that cannot be used; nothing fitted before is lost.
        """
        check_parameters(self.get_params(deep=False))
        source = self._open(data)
        classes = checked_classes(y, len(source), self.n_clusters) if self.supervised and y is not None else None
        order = np.random.default_rng(self.random_state).permutation(len(source))
        held = order[: round(self.holdout * len(source))]
        draft = copy.copy(self)  # takes effect when all is done, so that an interrupt loses nothing
        draft._fit(source, order[len(held) :], self._split(held)[0], classes)
        draft.skipped_ |= draft._calibrate(source, held, refuse=False)
        if draft.exit_choices_:  # made by the images that shape thresholds
            draft.fit_images_ = np.union1d(draft.fit_images_, draft._shaped)
        self.__dict__.update(draft.__dict__)
        warn_of_skipped(self.skipped_, source, "`skipped_`")
        return self

    def calibrate(
        self, data: ImageData, max_disagreement: float | None = None, confidence: float | None = None
    ) -> "ExitClusterer":
        """Set thresholds and certificate anew, from images that fit() did not see.

        Args:
            data: images like those to come, unlabelled; a quarter shapes thresholds, the rest certifies.
            max_disagreement: a new value; the one in use if None.
            confidence: a new value; the one in use if None.

        Raises:
            InputError: wishes or images that cannot be used, or images that fit() used, by their content; thresholds
                and certificate in use stay.
        """
        self._check_fitted()
        draft = copy.copy(self)
        draft.max_disagreement = self.max_disagreement if max_disagreement is None else max_disagreement
        draft.confidence = self.confidence if confidence is None else confidence
        check_parameters(draft.get_params(deep=False))
        source = self._open(data)
        order = np.random.default_rng(self.random_state).permutation(len(source))
        skipped = draft._calibrate(source, order, refuse=True)
        self.__dict__.update(draft.__dict__)
        warn_of_skipped(skipped, source)
        return self

    def predict(self, data: ImageData) -> np.ndarray:
        """Final clusters computed with early exits, (N,) int64 in input order; -1 where an image is unusable."""
        return self.run(data).labels

    def run(self, data: ImageData) -> ExitResult:
        """Labels, exits, scores and cost of every image, (N,) each, in input order.

        Raises:
            InputError: data that cannot be opened, or images of another shape than in fit().
        """
        source, batches = self._all(data, "cluster")
        result = self._cluster(batches, len(source))
        warn_of_skipped(result.skipped, source, "`skipped` of the result of run()")
        return result

    def stream(self, data: ImageData, begin: int = 0) -> Iterator[ExitResult]:
        """`run` for many images: results part by part, in input order, so that memory does not grow with their number.

        Args:
            data: images.
            begin: position of the first to cluster, >= 0, such as the number of rows that are written already.

        Yields:
            One result for every 64 batches; the positions in its `skipped` count from its own first image.

        Raises:
            InputError: as in `run`.
        """
        self._check_fitted()
        if begin < 0:
            raise InputError(f"begin must be the position of an image, >= 0; got {begin}")
        source = self._open(data)
        batches = self._batches(source, np.arange(begin, len(source)), "cluster")
        for part, n in parts(batches, begin, len(source), self.batch_size, PART):
            yield self._cluster(part, n)

    def predict_full(self, data: ImageData) -> np.ndarray:
        """Labels of the whole encoder, (N,) int64; -1 where an image is unusable."""
        source, batches = self._all(data, "whole encoder")
        labels, skipped = self.cascade_.full(batches, len(source), self.batch_size)
        warn_of_skipped(skipped, source)
        return labels

    def fit_predict(self, data: ImageData, y: np.ndarray | None = None) -> np.ndarray:
        """`fit(data, y)`, then `predict(data)`."""
        return self.fit(data, y).predict(data)

    def evaluate(self, data: ImageData, targets: np.ndarray | Sequence[int] | None = None) -> Evaluation:
        """Early exit beside the whole encoder on the same images: agreement, cost, and metrics.

        Args:
            data: images that neither fit() nor calibrate() saw.
            targets: ground truth, (N,) int, for ACC, NMI and ARI. Used here only.

        Raises:
            InputError: images or targets of another shape, or no image that can be used.
        """
        source, batches = self._all(data, "evaluate")
        targets = None if targets is None else checked_targets(targets, len(source))
        device = self.cascade_.thresholds.device
        float32 = self.cascade_.tapped.dtype == torch.float32
        exact = None if float32 else copy.deepcopy(self.encoder_).to(device)
        found = evaluate(self.cascade_, batches, len(source), self.batch_size, targets, exact)
        warn_of_skipped(found.result.skipped, source, "`result.skipped`")
        return found

    def explain(self, data: ImageData) -> Explanation:
        """Why images do or do not exit: per exit the scores, the thresholds, and what less agreement would release.

        Args:
            data: images like those to come; every exit is run on each, without leaving.

        Raises:
            InputError: data that cannot be opened, or no image that can be used.
        """
        source, batches = self._all(data, "explain")
        recorded, skipped = self.cascade_.record(batches, len(source))
        if len(recorded) == 0:
            raise InputError(f"none of the {len(source)} images can be used: {next(iter(skipped.values()))}")
        warn_of_skipped(skipped, source)
        thresholds = self.cascade_.thresholds.cpu().numpy()
        path, disagreement = self.threshold_path_, self.path_disagreement_
        return explain(self.exit_names_[:-1], recorded, thresholds, path, disagreement, self.certificate_)

    def trade_off(self, data: ImageData) -> tuple[np.ndarray, np.ndarray]:
        """Cost (multiply-adds, every exit at work) and agreement of every setting on `threshold_path_`, (S,) each."""
        source, batches = self._all(data, "record")
        recorded, _ = self.cascade_.record(batches, len(source))
        return trade_off(self.threshold_path_, recorded, self.cascade_.costs)

    def save(self, folder: str | Path) -> None:
        """Write the model into a new folder, or over a model that is there; `load` reads it.

        Raises:
            InputError: the folder exists and holds anything else.
        """
        from ssl_exit.saving import save  # which needs this class

        self._check_fitted()
        save(self, Path(folder))

    @property
    def certificate_(self) -> Certificate:
        self._check_fitted()
        return self._certificate.checked(fingerprint(self.encoder_, self.cascade_, self.preprocessing))

    @property
    def times_(self) -> StageTimes:
        self._check_fitted()
        assert self.cascade_.times is not None
        return self.cascade_.times

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
        """Final centroids, (K, F) float32.

        Raises:
            AttributeError: in the supervised mode, where there are none.
        """
        self._check_fitted()
        if not isinstance(self.cascade_.final, FinalClusters):
            raise AttributeError("in the supervised mode there are classes, and no centroids")
        return self.cascade_.final.centroids.cpu().numpy()

    def _fit(self, source: ImageSource, order: np.ndarray, shaping: np.ndarray, classes: np.ndarray | None) -> None:
        """Final clusters and a rule at every exit, from the images at positions `order`."""
        self.spec_ = self.encoder if isinstance(self.encoder, EncoderSpec) else None
        network = self.encoder.build() if isinstance(self.encoder, EncoderSpec) else as_module(self.encoder)
        self.encoder_ = copy.deepcopy(network).cpu().eval()
        example = first_images(source, order, self.batch_size)
        self.image_shape_ = tuple(example.shape[1:])
        given = self.get_params(deep=False)
        self._fitted_with = {name: given[name] for name in FIXED}
        found = build(self.encoder_, given, example, partial(self._batches, source), order, shaping, classes)
        self.cascade_, self.exit_choices_ = found.cascade, found.choices
        self._cut_from = module_hash(self.encoder_)
        self.fit_images_, self.skipped_ = found.images, found.skipped
        self.n_fit_, self.n_sample_ = found.n_fit, found.n_sample

    def _split(self, held: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        exits = MOST_EXITS if self.exits == "auto" else len(self.exits)
        return split_held_out(held, exits * len(rule_classes(self.rule)) * (self.n_clusters + 1))

    def _calibrate(self, source: ImageSource, held: np.ndarray, *, refuse: bool) -> dict[int, str]:
        """Thresholds and certificate from the images at positions `held`, and which of them were unusable.

        The cascade in use stays as it is; a new one takes its place.
        """
        if (now := module_hash(self.encoder_)) != self._cut_from:  # a certificate is about both, encoder and what runs
            given = self.get_params(deep=False) | self._fitted_with
            self.cascade_ = cut_anew(self.cascade_, self.encoder_, given, self.image_shape_)
            self._cut_from = now
        found = calibrate(
            self.cascade_,
            partial(self._batches, source),
            *self._split(held),
            np.cumsum(np.add(*work(self.cascade_, self.cost))),
            SeenImages([self.fit_images_]),
            thresholds=self.thresholds,
            guarantee=self.guarantee,
            max_disagreement=self.max_disagreement,
            confidence=self.confidence,
        )
        if refuse:
            refuse_fitted(found.skipped, source)
        self.cascade_, self._shaped = found.cascade, found.shaped
        about = fingerprint(self.encoder_, self.cascade_, self.preprocessing, found.images)
        self._certificate = replace(found.certificate, fingerprint=about)
        self._watch()
        self.threshold_path_, self.path_disagreement_ = found.path, found.path_disagreement
        if len(held) and found.certificate.settings == 0:
            warnings.warn(str(found.certificate), stacklevel=3)
        return found.skipped

    def _cluster(self, batches: Iterable[Batch], n: int) -> ExitResult:
        """Run the cascade over n images, positions from 0, and audit some."""
        if self.audit_ is None:
            return self.cascade_.run(batches, n, self.batch_size)
        rng = np.random.default_rng((self.random_state, self.audit_.images))
        result = self.cascade_.run(batches, n, self.batch_size, self.audit_.choose(n, rng))
        if self.audit_.take(result, rng):
            warnings.warn(str(self.audit_), stacklevel=3)
        return result

    def _watch(self) -> None:
        """Begin the audit anew."""
        eps = self._certificate.max_disagreement
        self.audit_ = DriftAudit(eps, self.audit, self.false_alarm) if self.audit else None

    def _open(self, data: ImageData) -> ImageSource:
        return open_images(data, self.preprocessing, self.num_workers)

    def _all(self, data: ImageData, what: str) -> tuple[ImageSource, Iterator[Batch]]:
        """Images for a fitted model, and batches of all of them in order."""
        self._check_fitted()
        source = self._open(data)
        return source, self._batches(source, np.arange(len(source)), what)

    def _batches(self, source: ImageSource, order: np.ndarray, what: str) -> Iterator[Batch]:
        return read(source, order, self.batch_size, self.image_shape_, what, self.progress)

    def _check_fitted(self) -> None:
        if not hasattr(self, "cascade_"):
            raise NotFittedError("this ExitClusterer is not fitted yet; call fit(data) first")
