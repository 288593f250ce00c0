"""A client: it has images, and answers questions about them with arrays."""

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from ssl_exit.clusterer import ExitClusterer
from ssl_exit.data.hashes import SeenImages, image_hashes, noted, tensors_hash
from ssl_exit.data.images import Batch, ImageData, open_images
from ssl_exit.data.reading import first_images
from ssl_exit.errors import InputError
from ssl_exit.exits.certificate import SettingCounts
from ssl_exit.exits.final import Final, FinalClusters
from ssl_exit.exits.rules import temperature_losses
from ssl_exit.exits.thresholds import Recorded
from ssl_exit.federated.questions import LOG_TEMPERATURES, Arrays, Sizes, narrow, triangle
from ssl_exit.federated.shared import Shared
from ssl_exit.fitting.calibrate import ThresholdPath, calibrated, leaving_costs, reader
from ssl_exit.fitting.count import count
from ssl_exit.fitting.cut import check_repeatable
from ssl_exit.fitting.fit_shard import CERTIFY, FIT, SHAPE, UNUSABLE, roles_of
from ssl_exit.fitting.record import record, record_logits
from ssl_exit.fitting.sample import described_sample


class Client:
    """Answers about images that stay where they are.

    What an image is for follows from its content and the seed, so a copy at another client is for the same; of copies
    here one certifies. Between questions it keeps the final features of its images, and nothing that it must not lose.

    Args:
        c: a clusterer with the parameters of the server's; left unchanged.
        images: as `ExitClusterer.fit` takes them.
        rows: answer with labels and scores of single images where the server wants them for thresholds; by default
            with counts alone.
        least: images of a cluster, below which it gives no sum over them to k-means and statistics: a sum over one
            image is what the encoder says of it. Default 1: gives all. What several answers differ by can still tell
            of hidden images, and counts that certify are told of all.

    Raises:
        InputError: parameters that a federated fit does without, or images that cannot be used.
    """

    def __init__(self, c: ExitClusterer, images: ImageData, *, rows: bool = False, least: int = 1) -> None:
        if least < 1:
            raise InputError(f"least is a number of images, 1 or more; got {least}")
        self.shared, self.rows, self.least = Shared(c), rows, least
        runtime = self.shared.settings.runtime
        self.source = open_images(images, c.preprocessing, runtime.num_workers, max_pixels=runtime.max_pixels,
                                  key=runtime.image_key)  # fmt: skip
        self.questions: dict[str, Callable[[Arrays], Arrays]] = {
            "hello": self._hello, "start": self._start, "lloyd": self._lloyd, "statistics": self._statistics,
            "losses": self._losses, "rows": self._rows, "trials": self._trials, "counts": self._counts,
        }  # fmt: skip
        self._last: tuple[str, Recorded] | None = None

    def answer(self, question: str, told: Arrays) -> Arrays:
        """The answer to a question (see `ssl_exit.federated.questions`).

        Raises:
            InputError: no such question, or one that this client does not answer.
        """
        if question not in self.questions:
            raise InputError(f"there is no question {question!r}; there are {sorted(self.questions)}")
        if question != "hello":  # which compares parameters before images are read
            self._survey  # noqa: B018  # a process that was started anew has not said hello
        try:
            return self.questions[question](told)
        except KeyError as error:
            raise InputError(f"question {question!r} came without {error}") from error

    def calibrated(self, c: ExitClusterer) -> ExitClusterer:
        """A copy of the clusterer that `fit_federated` fitted, with thresholds certified for this client alone.

        Its images that certify choose among the settings of the federated path, which they did not shape; so that the
        claim, about images like this client's, holds with the confidence of the fit. The copy knows which of this
        client's images it was fitted to or shaped by: `calibrate` refuses them.

        Raises:
            InputError: the clusterer is not one that `fit_federated` fitted with this client's parameters, or it was
                calibrated since.
        """
        if not hasattr(c, "model_") or c.model_.certificate.guarantee not in ("mixture", "client"):
            raise InputError("expected a clusterer as fit_federated left it; fit it, and calibrate it only afterwards")
        if differ := self.shared.differs_from(Shared(c).about):
            raise InputError(f"this clusterer is of another fit than this client: {', '.join(differ)}")
        model, hashes = c.model_, list[np.ndarray]()
        cascade, settings = model.cascade, model.settings
        recorded, skipped = record(cascade, noted(self._batches(CERTIFY, "certify"), hashes))
        costs = leaving_costs(cascade, settings.calibration.cost, range(len(cascade.rules)))
        path = ThresholdPath(cascade, model.path, Recorded.empty(len(cascade.rules)), costs)
        counts = SettingCounts.count(model.path, recorded)
        own, seen = np.union1d(self._survey.keys, self._survey.shaping), SeenImages(hashes).hashes
        local = replace(model, provenance=replace(model.provenance, images=own))
        copied = copy.copy(c)
        copied._hold(calibrated(local, path, counts, np.empty(0, np.uint64), seen, skipped, settings))
        return copied

    @cached_property
    def _survey(self) -> "_Survey":
        shared, n = self.shared, len(self.source)
        example = first_images(self.source, np.arange(n), shared.settings.batch_size).images.cpu()
        shared.cut_for(example)
        check_repeatable(shared.encoder, shared.tapped, example, shared.settings)
        roles, seen, total = np.full(n, UNUSABLE, np.int8), np.empty(0, np.uint64), np.zeros(shared.tapped.dim)
        keys, shaping, features = [seen], [seen], [torch.empty(0, shared.tapped.output.dim)]
        for batch in reader(self.source, shared.settings, tuple(example.shape[1:]))(np.arange(n), "survey"):
            if len(batch.indices) == 0:
                continue
            own = described_sample(shared.tapped, batch, image_hashes(batch.images), {})
            role = roles_of(own.keys, shared.settings)
            new = np.zeros(len(own), dtype=bool)
            new[np.unique(own.keys, return_index=True)[1]] = True
            new &= ~np.isin(own.keys, seen)
            roles[own.indices.numpy()] = np.where((role == FIT) | new, role, UNUSABLE)
            seen = np.union1d(seen, own.keys)
            fit = own.at(np.flatnonzero(role == FIT))
            total += fit.descriptors.double().sum(0).numpy()
            keys.append(fit.keys)
            shaping.append(own.keys[role == SHAPE])
            features.append(fit.features)
        return _Survey(roles, np.concatenate(keys), np.concatenate(shaping), torch.cat(features), total)

    def _told_of(self, final: Final) -> Tensor:
        """Which images to fit are in clusters large enough to tell of, (n,) bool."""
        labels = final(self._survey.features)
        return torch.bincount(labels, minlength=final.n_clusters)[labels] >= self.least

    def _batches(self, role: int, task: str, own: np.ndarray | None = None) -> Iterable[Batch]:
        """Images for a purpose, or those of them, (n,) bool."""
        shape = self.shared.cut.example.shape[1:]
        positions = np.flatnonzero(self._survey.roles == role)
        positions = positions if own is None else positions[own]
        return reader(self.source, self.shared.settings, tuple(shape))(positions, task)

    def _hello(self, told: Arrays) -> Arrays:
        if differ := self.shared.differs_from(told["about"]):
            raise InputError(f"this client has other parameters than the server: {', '.join(differ)}")
        fit, shape, certify, skipped = (
            int((self._survey.roles == role).sum()) for role in (FIT, SHAPE, CERTIFY, UNUSABLE)
        )
        image = tuple(self.shared.cut.example.shape[1:])
        return Sizes(fit, shape, certify, skipped, image, self.rows).to_arrays()

    def _start(self, told: Arrays) -> Arrays:
        settings, features = self.shared.settings, self._survey.features
        k, spherical = min(settings.k, len(features)), settings.clusters.spherical
        centroids, counts = np.empty((0, features.shape[1]), np.float32), np.empty(0, np.int64)
        if k:
            own = FinalClusters.fit(features, k, spherical=spherical, seed=settings.random_state)
            counts = np.bincount(own(features).numpy(), minlength=k)
            told_of = counts >= self.least
            centroids, counts = own.centroids.numpy()[told_of], counts[told_of]
        few = len(features) < self.least
        return {"centroids": centroids, "counts": counts, "descriptors": self._survey.descriptors * (not few),
                "n": np.asarray(0 if few else len(features), dtype=np.int64)}  # fmt: skip

    def _lloyd(self, told: Arrays) -> Arrays:
        final, features = self.shared.final(told), self._survey.features
        assert isinstance(final, FinalClusters)
        labels, k, own = final(features), final.n_clusters, self._told_of(final)
        labels, features = labels[own], features[own]
        points = torch.nn.functional.normalize(features, dim=1) if final.spherical else features
        sums = torch.zeros(k, features.shape[1]).double().index_add_(0, labels, points.double())
        inertia = final.squared_distances(features).min(1).values.double().sum()
        counts = torch.bincount(labels, minlength=k)
        return {"sums": sums.numpy(), "counts": counts.numpy(), "inertia": inertia.numpy()}

    def _statistics(self, told: Arrays) -> Arrays:
        shared, origin = self.shared, torch.from_numpy(told["origin"].copy())
        final = shared.final(told)
        batches = self._batches(FIT, "statistics", self._told_of(final).numpy())
        statistics = count(shared.tapped, batches, final, origin, scatter=shared.needs_scatter)
        answer = Arrays()
        for i, one in enumerate(statistics.exits):
            answer |= {f"counts_{i}": one.counts.numpy(), f"sums_{i}": one.sums.numpy()}
            answer |= {} if one.scatter is None else {f"scatter_{i}": triangle(one.scatter.numpy())}
        return answer

    def _losses(self, told: Arrays) -> Arrays:
        cascade = self.shared.cascade(told)
        logits, _ = record_logits(cascade, self._batches(SHAPE, "temperatures"))
        each = [temperature_losses(z, logits.final, LOG_TEMPERATURES) for z in logits.of_each(cascade.rules)]
        return {"losses": np.stack(each), "n": np.asarray(len(logits), dtype=np.int64)}

    def _rows(self, told: Arrays) -> Arrays:
        if not self.rows:
            raise InputError("this client answers with counts alone, not with rows of single images")
        recorded = self._recorded(told, SHAPE)
        return {"labels": recorded.labels, "scores": recorded.scores, "final": recorded.final}

    def _trials(self, told: Arrays) -> Arrays:
        recorded = self._recorded(told, SHAPE)
        counts = SettingCounts.count(self._path(told), recorded)
        left, wrong = counts.left.sum(2).astype(np.int32), counts.disagreements.astype(np.int32)
        return {"left": left, "wrong": wrong, "n": np.asarray(counts.n, dtype=np.int64)}

    def _counts(self, told: Arrays) -> Arrays:
        return narrow(SettingCounts.count(self._path(told), self._recorded(told, CERTIFY)))

    def _path(self, told: Arrays) -> np.ndarray:
        """Settings, (S, E, K), out of those told, (S, E) where all clusters share a threshold."""
        settings = told["settings"]
        if settings.ndim == 3:
            return settings
        return np.repeat(settings[:, :, None], self.shared.settings.k, axis=2)

    def _recorded(self, told: Arrays, role: int) -> Recorded:
        """What the exits of a cascade say; the last answer is kept, since trials ask for the same again."""
        own = {name: torch.from_numpy(np.array(value)) for name, value in told.items() if name != "settings"}
        key = f"{role} {tensors_hash(own)}"
        if self._last is None or self._last[0] != key:
            self._last = key, record(self.shared.cascade(told), self._batches(role, "record"))[0]
        return self._last[1]


@dataclass(frozen=True)
class _Survey:
    """What a client keeps of its images.

    Attributes:
        roles: what every image is for, (N,) int8; UNUSABLE where it is for nothing.
        keys: content hashes of those to fit, (n,) uint64.
        shaping: of those that shape thresholds, uint64.
        features: final features of those to fit, (n, F).
        descriptors: the sum of their descriptors, (dim,) float64.
    """

    roles: np.ndarray
    keys: np.ndarray
    shaping: np.ndarray
    features: Tensor
    descriptors: np.ndarray
