"""ExitClusterer: the estimator users hold."""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from sklearn.base import ClusterMixin

from ssl_exit.cascade.cascade import describe
from ssl_exit.cascade.result import ExitResult
from ssl_exit.clusterer.attributes import Fitted
from ssl_exit.clusterer.checks import beside, built
from ssl_exit.data.images import Batch, ImageData, ImageSource, open_images
from ssl_exit.data.items import each_image, unsized
from ssl_exit.data.reading import parts, read, warn_of_skipped
from ssl_exit.errors import InputError
from ssl_exit.exits.audit import DriftAudit
from ssl_exit.exits.final import FinalClusters
from ssl_exit.exits.thresholds import Recorded, trade_off
from ssl_exit.fitting.calibrate import refuse_fitted, too_few, warn_of_nothing
from ssl_exit.fitting.fit import fit, recalibrate
from ssl_exit.fitting.fit_shard import fit_shard
from ssl_exit.fitting.record import record
from ssl_exit.fitting.shards import Shard
from ssl_exit.measure.evaluation import Evaluation, evaluate
from ssl_exit.measure.explanation import Explanation, explain
from ssl_exit.model import Model
from ssl_exit.settings import Calibration, Runtime
from ssl_exit.storage import save_model

PART = 64  # batches whose results stream() returns at a time


class ExitClusterer(ClusterMixin, Fitted):
    """Cluster images with an encoder, computing for each only as many layers as it needs.

    Parameters that belong together form groups; the first field of a group may stand for it (`rule="mlp"` means
    `rule=Rule("mlp")`), and nested names reach into it (`set_params(rule__options={"hidden": 64})`).

    Parameters:
        encoder: images to features: a module (it is copied, never changed); a list of modules that are its
            stages, for networks torch.fx cannot trace; an EncoderSpec, which load() can build again; or, with a
            front, any callable from images to features, such as an ONNX session or a client of a service.
        n_clusters: K, the number of final clusters (default 10); "auto", the number of largest silhouette x stability
            on a sample (`cluster_counts_`); or the final clusters themselves: centroids, (K, F), a fitted k-means of
            scikit-learn or FAISS, or a head: a module, callable or fitted classifier from final features, (N, F), to
            logits, (N, K). A label is then the row of the nearest centroid, or the largest logit.
        exits: names of exit points, "auto" (default), or `Exits`: points, descriptor, accumulate, normalize, patience,
            ensemble.
        rule: name of an exit rule (default "centroid"; docs/rules.md), or `Rule`: name, options, mirror.
        front: a small network before the encoder, taught the final clusters: None (default), "auto" (sized to the
            encoder), a module of your own (images to features), or `Front`: macs, time, width, epochs, seconds, ...
        max_disagreement: share of images whose label may differ from the full encoder's, in (0, 1). Default 0.02.
        confidence: with which that must hold, in (0, 1); 0.5 asks for no safety margin. Default 0.95.
        batch_size: images a stage runs on at a time. Default 256.
        device: "auto" (default: CUDA where there is one), or what torch.device takes.
        random_state: seed of the hold-out split, of the order of images in fit, of k-means and of teaching. Default 0.
        clusters: `Clusters`: spherical, supervised.
        calibration: a guarantee by name, or `Calibration`: guarantee, thresholds, cost, holdout, audit, false_alarm.
        runtime: `Runtime`: precision, compile, num_workers, progress.
        preprocessing: for image files and uint8 images, a `Preprocessing` or a `Transform`; float tensors are taken as
            they are. Default None.

    Attributes:
        model_: the fitted `Model`, a value: cascade, certificate, threshold path, provenance.
        labels_: final clusters of the images of `fit_predict`.
        exit_points_, exit_names_: list of ExitPoint, and names for the numbers in `ExitResult.exits`.
        cluster_centers_: final centroids, (K, F) float32.
        cluster_counts_: with n_clusters="auto", silhouette and stability of every number that was tried.
        inertia_: sum of squared distances of the images that k-means saw to their nearest final centroid.
        certificate_: what calibration showed; `void` once thresholds, rules, preprocessing or weights are others.
        exit_choices_: with exits="auto", why each candidate was kept or left out.
        skipped_: position and reason of images that fit() could not use.
        times_: measured seconds of stages and exits at several batch sizes (see `StageTimes`).
        audit_: the DriftAudit of all images since fit(), calibrate() or load(); None without one.

    Notes:
        docs/parameters.md lists every field of every group.

        fit() passes once over the images (twice with `Rule.mirror`), and times stages on one batch. With a front it
        passes once more with the full encoder, keeps the images in half precision where they take less than a quarter
        of the memory, and their soft assignments twice, and passes over them in every epoch. It holds in
        memory, beside one batch and the data themselves: the descriptors and final features of a random sample
        (10,000 images, or 256 a cluster if that is more; 50,000 for trained heads, with their soft assignments; up to
        512 MB of descriptors), on whose first part k-means runs; one D x D scatter of the accumulated descriptor;
        logits of the held-out images that shape thresholds (up to 256 MB), labels and scores of the others, and
        thresholds and counts of 1,177 settings for every exit and cluster.

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

    def fit(
        self,
        data: ImageData,
        y: np.ndarray | None = None,
        sample_weight: np.ndarray | None = None,
        *,
        shard: Shard | None = None,
    ) -> "ExitClusterer":
        """Find final clusters, fit an exit rule at every exit point, and calibrate on images held out by seed.

        Args:
            data: images (see `open_images`); never labels.
            y: classes, (N,) int, in the supervised mode; ignored otherwise, as scikit-learn has it.
            sample_weight: of every image in k-means, (N,), >= 0; None: all alike. Exit rules count every image once.
            shard: where the data are one of several shards, whose fits come to one model (docs/scale.md): a
                `ssl_exit.scale.DistributedShard` or `StoredShard`; None (default): they are all there is.

        Raises:
            InputError: parameters, images or an encoder that cannot be used; nothing fitted before is lost.
            PartWritten: not an error: with a `StoredShard`, the part of this job is written.
        """
        with shard or Shard():  # which tells the others where this one fails
            source, foreseen = self._fit(data, y, sample_weight, shard)
        self.__dict__.pop("labels_", None)  # of other images
        if not foreseen and self.model_.settings.calibration.holdout:
            warn_of_nothing(self.model_.certificate, stacklevel=2)
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
            InputError: parameters or images that cannot be used, or images that fit() used, by their content;
                thresholds and certificate in use stay.
        """
        self._check_fitted()
        new = {"max_disagreement": max_disagreement, "confidence": confidence}
        new = {name: value for name, value in new.items() if value is not None}
        settings, source = replace(self.settings(), **new), self._open(data)  # type: ignore[arg-type]
        model = recalibrate(replace(self.model_, preprocessing=self.preprocessing), source, settings)
        skipped = model.provenance.calibration_skipped
        refuse_fitted(skipped, source)
        self.set_params(**new)
        self._hold(model)
        warn_of_nothing(model.certificate, stacklevel=2)
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

    def stream(self, data: ImageData, start: int = 0) -> Iterator[ExitResult]:
        """`run` for many images: results part by part, in input order, so that memory does not grow with their number.

        Args:
            data: images; an iterable without a length, or a DataLoader over one, is read as it comes.
            start: position of the first to cluster, >= 0, such as the number of rows that are written already.

        Yields:
            One result for every 64 batches; the positions in its `skipped` count from its own first image.

        Raises:
            InputError: as in `run`.
        """
        self._check_fitted()
        if start < 0:
            raise InputError(f"start must be the position of an image, >= 0; got {start}")
        if unsized(data):
            images = islice(each_image(data, Runtime.of(self.runtime).image_key), start, None)
            while some := list(islice(images, PART * self.batch_size)):
                yield self.run(some)
            return
        source = self._open(data)
        batches = self._batches(source, np.arange(start, len(source)), "cluster")
        for part, n in parts(batches, start, len(source), self.batch_size, PART):
            yield self._cluster(part, n)

    def predict_full(self, data: ImageData) -> np.ndarray:
        """Labels of the full encoder, (N,) int64; -1 where an image is unusable."""
        source, batches = self._all(data, "full encoder")
        result = self.model_.run_full(batches, len(source), self.batch_size)
        warn_of_skipped(result.skipped, source)
        return result.labels

    def fit_predict(self, data: ImageData, y: np.ndarray | None = None) -> np.ndarray:
        """`fit(data, y)`, then `predict(data)`, which are also `labels_`."""
        self.labels_ = self.fit(data, y).predict(data)
        return self.labels_

    def evaluate(self, data: ImageData, targets: np.ndarray | Sequence[int] | None = None) -> Evaluation:
        """Early exit beside the full encoder on the same images: agreement, cost, and metrics.

        Args:
            data: images that neither fit() nor calibrate() saw.
            targets: ground truth, (N,) int, for ACC, NMI and ARI. Used here only.

        Raises:
            InputError: images or targets of another shape, or no image that can be used.
        """
        source, batches = self._all(data, "evaluate")
        truth = None if targets is None else np.asarray(targets)
        if truth is not None and truth.shape != (len(source),):
            raise InputError(f"targets must have shape ({len(source)},), one for each image; got {truth.shape}")
        evaluation = evaluate(self.model_, batches, len(source), self.batch_size, truth)
        warn_of_skipped(evaluation.result.skipped, source, "`result.skipped`")
        return evaluation

    def explain(self, data: ImageData) -> Explanation:
        """Why images do or do not exit: per exit the scores, the thresholds, and what less agreement would release.

        Args:
            data: images like those to come; every exit is run on each, without leaving.

        Raises:
            InputError: data that cannot be opened, or no image that can be used.
        """
        source, recorded, skipped = self._recorded(data)
        if len(recorded) == 0:
            raise InputError(f"none of the {len(source)} images can be used: {next(iter(skipped.values()))}")
        warn_of_skipped(skipped, source)
        model = self.model_
        names, thresholds = self.exit_names_[:-1], model.cascade.thresholds
        return explain(names, recorded, thresholds, model.path, model.path_disagreement, self.certificate_)

    def trade_off(self, data: ImageData) -> tuple[np.ndarray, np.ndarray]:
        """Cost (multiply-adds, every exit at work) and agreement of every setting on the threshold path, (S,) each."""
        _, recorded, _ = self._recorded(data)
        return trade_off(self.model_.path, recorded, self.model_.cascade.costs)

    def embed(self, data: ImageData) -> np.ndarray:
        """Final features of the full encoder, (N, F) float32; NaN where an image is unusable."""
        source, batches = self._all(data, "embed")
        features = np.full((len(source), self.model_.cascade.tapped.output.dim), np.nan, dtype=np.float32)
        skipped: dict[int, str] = {}
        for each in describe(self.model_.cascade.tapped, batches):
            features[each.indices.numpy()] = each.features.cpu().numpy()
            skipped |= each.skipped
        warn_of_skipped(skipped, source)
        return features

    def transform(self, data: ImageData) -> np.ndarray:
        """Distances of final features to the final centroids, (N, K), by direction where clusters are spherical.

        Raises:
            AttributeError: in the supervised mode, where there are no centroids.
        """
        return self._squared_distances(data).clamp(min=0).sqrt().numpy()

    def score(self, data: ImageData, y: np.ndarray | None = None) -> float:
        """Minus the sum of squared distances of final features (full pass) to the centroid of the label that early exit
        gives, as KMeans.score; unusable images are left out."""
        labels, squares = torch.from_numpy(self.predict(data)), self._squared_distances(data)
        usable = labels >= 0
        return -float(squares[usable].gather(1, labels[usable, None]).double().sum())

    def save(self, folder: str | Path) -> None:
        """Write the model into a new folder, or over a model that is there; `load` reads it.

        Raises:
            InputError: the folder exists and holds anything else.
        """
        model, runtime, how = self._fitted(), Runtime.of(self.runtime), Calibration.of(self.calibration)
        settings = replace(model.settings, batch_size=self.batch_size).nested(
            runtime={name: getattr(runtime, name) for name in ("num_workers", "max_pixels", "image_key", "progress")},
            calibration={"audit": how.audit, "false_alarm": how.false_alarm},
        )
        save_model(Path(folder), replace(model, settings=settings, preprocessing=self.preprocessing))

    def _fit(
        self, data: ImageData, y: np.ndarray | None, sample_weight: np.ndarray | None, shard: Shard | None
    ) -> tuple[ImageSource, str]:
        """Hold a new model; return its images, and why none may exit early where that is known before."""
        settings, source = self.settings(), self._open(data)
        about_images = beside(y, sample_weight, len(source), settings, self.encoder)
        if shard is not None and any(each is not None for each in about_images):
            raise InputError("a fit of shards takes neither y nor sample_weight")
        if foreseen := too_few(len(source), settings) if shard is None else "":
            warnings.warn(foreseen, stacklevel=3)
        network, spec = built(self.encoder)
        how = settings, self.preprocessing, spec
        self._hold(fit_shard(network, source, shard, *how) if shard else fit(network, source, *how, *about_images))
        return source, foreseen

    def _squared_distances(self, data: ImageData) -> torch.Tensor:
        spherical = self._fitted().settings.clusters.spherical
        final = FinalClusters(torch.from_numpy(self.cluster_centers_), spherical)
        return final.squared_distances(torch.from_numpy(self.embed(data)))

    def _hold(self, model: Model) -> None:
        """Use a model, and begin the audit anew."""
        self.model_, how = model, model.settings.calibration
        eps = model.certificate.max_disagreement
        self.audit_ = DriftAudit(eps, how.audit, how.false_alarm) if how.audit else None

    def _cluster(self, batches: Iterable[Batch], n: int) -> ExitResult:
        """Run the cascade over n images, positions from 0, and audit some."""
        if self.audit_ is None:
            return self.model_.run(batches, n, self.batch_size)
        rng = np.random.default_rng((self.random_state, self.audit_.images))
        result = self.model_.run(batches, n, self.batch_size, self.audit_.choose(n, rng))
        if self.audit_.take(result.labels, result.audited, rng):
            warnings.warn(str(self.audit_), stacklevel=3)
        return result

    def _recorded(self, data: ImageData) -> tuple[ImageSource, Recorded, dict[int, str]]:
        """What every exit says of the images, and those that could not be used."""
        source, batches = self._all(data, "record")
        return source, *record(self.model_.cascade, batches)

    def _open(self, data: ImageData) -> ImageSource:
        how = Runtime.of(self.runtime)
        return open_images(data, self.preprocessing, how.num_workers, max_pixels=how.max_pixels, key=how.image_key)

    def _all(self, data: ImageData, task: str) -> tuple[ImageSource, Iterator[Batch]]:
        """Images for a fitted model, and batches of all of them in order."""
        self._check_fitted()
        source = self._open(data)
        return source, self._batches(source, np.arange(len(source)), task)

    def _batches(self, source: ImageSource, order: np.ndarray, task: str) -> Iterator[Batch]:
        shape, progress = self.model_.image_shape, Runtime.of(self.runtime).progress
        return read(source, order, self.batch_size, shape, task, progress=progress)
