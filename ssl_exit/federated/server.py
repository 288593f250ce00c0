"""The server: from what clients answer to a fitted model; no image, and no hash of one, leaves a client."""

import math
from dataclasses import dataclass
from functools import reduce
from itertools import combinations
from operator import add
from typing import Literal

import numpy as np
import torch

from ssl_exit.cascade.cascade import Cascade
from ssl_exit.cascade.times import stage_times
from ssl_exit.clusterer import ExitClusterer
from ssl_exit.errors import InputError
from ssl_exit.exits.certificate import Certificate, SettingCounts, certify, upper_bound
from ssl_exit.exits.final import Final, FinalClasses, FinalClusters
from ssl_exit.exits.mixture import client_passes, mixture_passes
from ssl_exit.exits.statistics import ClusterStatistics
from ssl_exit.exits.thresholds import Recorded
from ssl_exit.federated.kmeans import lloyd_step, start_from, trimmed
from ssl_exit.federated.questions import (
    LOG_TEMPERATURES,
    Arrays,
    Ask,
    check_counts,
    check_lloyd,
    check_losses,
    check_rows,
    check_start,
    check_statistics,
    check_trials,
    symmetric,
    widened,
)
from ssl_exit.federated.shared import Shared, with_temperatures
from ssl_exit.federated.tally import FederatedReport, Tally
from ssl_exit.fitting.calibrate import ThresholdPath, calibrated, leaving_costs, path_from, uncertified
from ssl_exit.fitting.count import Collected, Statistics
from ssl_exit.fitting.place import choose, chosen, costs_with, places_exits, work
from ssl_exit.model import Model
from ssl_exit.provenance import ExitChoice, Provenance

TRIALS = np.array([np.inf, *(1 / (1 + np.exp(-np.linspace(7, -1.5, 23)))), 0.0])  # thresholds by which exits are placed
FAR = 12.0  # log-odds of the surest threshold of the path


@dataclass(frozen=True)
class Federation:
    """How a server fits with clients.

    Attributes:
        rounds: Lloyd steps at most; fewer once the inertia falls by less than a ten-thousandth.
        thresholds: "counts": one threshold for all exits and clusters, from sums alone; "rows": one for every exit and
            cluster, from labels and scores of the images that shape them, if all clients allow it.
        guarantee: "mixture": of the images of all clients together; "client": of those of every client (see
            `ssl_exit.exits.mixture`).
        trim: share of clients, at either end, that coordinate-wise trimmed means leave out, in [0, 0.5); as many
            clients that speak most for a setting do not certify it. 0: sums.
        fewest: share of the clients that must answer every question, in (0, 1].
        tries: how often clients that did not answer in time are asked again.
        settings: thresholds that are tried, of "counts".
    """

    rounds: int = 20
    thresholds: Literal["counts", "rows"] = "counts"
    guarantee: Literal["mixture", "client"] = "mixture"
    trim: float = 0.0
    fewest: float = 0.5
    tries: int = 1
    settings: int = 96

    def __post_init__(self) -> None:
        legal = {
            "rounds": self.rounds >= 0,
            "thresholds": self.thresholds in ("counts", "rows"),
            "guarantee": self.guarantee in ("mixture", "client"),
            "trim": 0 <= self.trim < 0.5,
            "fewest": 0 < self.fewest <= 1,
            "tries": self.tries >= 0,
            "settings": self.settings >= 2,
        }
        if wrong := [name for name, good in legal.items() if not good]:
            raise InputError(f"{wrong[0]} of a Federation cannot be {getattr(self, wrong[0])!r}; see its docstring")


def fit_federated(c: ExitClusterer, ask: Ask, how: Federation = Federation()) -> FederatedReport:
    """Fit a clusterer to the images of clients.

    Args:
        c: with the parameters that all clients have too; it holds the model afterwards.
        ask: the transport, such as `local_clients`, or that of a Flower app.
        how: see `Federation`.

    Returns:
        What every client contributed, in images and bytes.

    Raises:
        InputError: parameters that a federated fit does without, too few clients that answer, or clients of different
            encoders, parameters or images; a model fitted before is kept.
    """
    model, report = _Server(c, ask, how).fit()
    c._hold(model)
    return report


class _Server:
    def __init__(self, c: ExitClusterer, ask: Ask, how: Federation) -> None:
        self.shared, self.how = Shared(c), how
        self.tally = Tally(ask, how.fewest, how.tries)

    def fit(self) -> tuple[Model, FederatedReport]:
        shared, tally, how = self.shared, self.tally, self.how
        sizes = tally.hello({"about": shared.about})
        shape = next(iter(sizes.values())).image
        noise = torch.rand(shared.settings.batch_size, *shape, generator=torch.Generator().manual_seed(0))
        shared.cut_for(noise)
        settings = shared.settings
        if how.thresholds == "rows" and not all(one.rows for one in sizes.values()):
            raise InputError('some clients answer with counts alone: use thresholds="counts", or leave them out')

        final, n_sample, origin = self._final()
        collected = self._statistics(final, origin)
        names = [point.name for point in shared.tapped.staged.exit_points]
        kept, choices = list(range(len(names))), list[ExitChoice]()
        cascade = self._cascade(collected, kept)
        times = stage_times(cascade.tapped, cascade.rules, cascade.final, noise)
        cascade = self._calibrated(cascade.timed(times), kept)
        if places_exits(settings) and any(one.shape for one in sizes.values()):
            choices = self._placed(cascade, names)
            kept = [i for i, choice in enumerate(choices) if choice.kept] or kept
            if len(kept) < len(names):
                cascade = self._cascade(collected.at(shared.tapped, kept), kept).timed(times.without(kept))
                cascade = self._calibrated(cascade, kept)

        path = self._path(cascade, kept)
        outcome, counts = self._certified(path, kept)
        used = Provenance(np.empty(0, np.uint64), {}, collected.n_fit, n_sample, tuple(choices),
                          inertia=next(iter(reversed(tally.report.inertia)), float("nan")))  # fmt: skip
        model = uncertified(shared.encoder, shared.spec, cascade, settings, shared.preprocessing, shape, used)
        nothing = np.empty(0, np.uint64)
        return calibrated(model, path, counts, nothing, nothing, {}, model.settings, outcome), tally.finished()

    def _final(self) -> tuple[Final, int, np.ndarray]:
        """The final clusters, the number of images behind them, and an origin near the mean descriptor, (dim,)."""
        shared, settings, k = self.shared, self.shared.settings, self.shared.settings.k
        n_features, dim, spherical = shared.tapped.output.dim, shared.tapped.dim, settings.clusters.spherical
        starts = self.tally.of_each("start", {}, lambda a, s: check_start(a, s, k, n_features, dim, spherical))
        n = sum(int(a["n"]) for a in starts.values())
        if n < k:
            raise InputError(f"all clients together tell of {n} images to fit; {k} clusters need at least as many")
        means = [a["descriptors"] / a["n"] for a in starts.values() if a["n"]]
        origin = np.median(means, axis=0)  # any origin will do; one client must not move it far
        if settings.clusters.supervised:
            if n_features != k:
                raise InputError(f"in the supervised mode the encoder gives one logit a class: {n_features}, not {k}")
            return FinalClasses(k), 0, origin
        if settings.clusters.centroids is not None:
            own = torch.tensor(settings.clusters.centroids)
            return FinalClusters.given(own, torch.empty(0, n_features), spherical=spherical), 0, origin
        pool, sizes = (np.concatenate([a[name] for a in starts.values()]) for name in ("centroids", "counts"))
        if len(pool) < k:
            raise InputError(f"clients tell of {len(pool)} clusters of their own; {k} clusters need at least as many")
        centroids = start_from(pool, sizes, k, spherical=spherical, seed=settings.random_state)
        inertia = self.tally.report.inertia
        for _ in range(self.how.rounds):
            answers = list(self.tally.of_each(
                "lloyd", {"centroids": centroids}, lambda a, s: check_lloyd(a, s, k, n_features, spherical)
            ).values())  # fmt: skip
            counts = np.stack([a["counts"] for a in answers])
            sums = trimmed(np.stack([a["sums"] for a in answers]), counts, self.how.trim)
            centroids = lloyd_step(sums, counts.sum(0), pool, sizes, spherical=spherical)
            inertia.append(float(sum(a["inertia"] for a in answers)))
            if len(inertia) > 1 and abs(inertia[-2] - inertia[-1]) < 1e-4 * inertia[-1]:
                break
        return FinalClusters(torch.from_numpy(centroids), spherical), n, origin

    def _statistics(self, final: Final, origin: np.ndarray) -> Collected:
        """All that rules are fitted to."""
        shared, k, trim = self.shared, self.shared.settings.k, self.how.trim
        scatter = shared.needs_scatter
        told = _told_final(final) | {"origin": origin}
        answers = list(self.tally.of_each(
            "statistics", told, lambda a, s: check_statistics(a, s, k, shared.dims, scatter)
        ).values())  # fmt: skip
        exits = []
        columns = [slice(None)] if shared.tapped.accumulate else shared.tapped.columns
        for i, part in enumerate(columns):
            counts = np.stack([a[f"counts_{i}"] for a in answers])
            sums = trimmed(np.stack([a[f"sums_{i}"] for a in answers]), counts, trim)
            squares = None
            if scatter:
                each = [symmetric(a[f"scatter_{i}"]) for a in answers]
                total = _trimmed_scatter(answers, each, i, sums, trim) if trim else np.sum(each, axis=0)
                squares = torch.from_numpy(total)
            where = torch.from_numpy(origin[part].copy())
            exits.append(ClusterStatistics(where, torch.from_numpy(counts.sum(0)), torch.from_numpy(sums), squares))
        no = torch.empty(0, shared.tapped.dim), torch.empty(0, dtype=torch.int64), torch.empty(0, k)
        return Collected(final, Statistics(exits), *no)

    def _cascade(self, collected: Collected, kept: list[int]) -> Cascade:
        shared = self.shared
        tapped = shared.at(kept)
        return collected.fit(tapped, shared.rules(tapped), shared.cut.across, shared.settings.random_state)

    def _calibrated(self, cascade: Cascade, kept: list[int]) -> Cascade:
        """With the temperatures that make held-out final labels likeliest, by summed losses."""
        if not any(rule.calibrated for rule in cascade.rules):
            return cascade
        told, e = self.shared.told(cascade, kept), len(kept)
        answers = self.tally.of_each("losses", told, lambda a, s: check_losses(a, s, e)).values()
        losses = np.sum([a["losses"] for a in answers], axis=0)
        if not sum(int(a["n"]) for a in answers):
            return cascade
        return with_temperatures(cascade, [float(np.exp(_least(one))) for one in losses])

    def _placed(self, cascade: Cascade, names: list[str]) -> list[ExitChoice]:
        """Which of the candidate exits pay for themselves."""
        settings = self.shared.settings
        (stage, own), eps, every = (
            work(cascade, settings.calibration.cost),
            settings.max_disagreement,
            range(len(names)),
        )
        if self.how.thresholds == "rows":
            recorded = self._rows(cascade, [*every])
            return chosen(names, recorded, stage, own, settings.k, eps) if len(recorded) else []

        sets = [kept for size in (e + 1 for e in every) for kept in combinations(every, size)]
        left, wrong, n = self._trials(cascade, sets)
        if n == 0:
            return []
        cost = dict[tuple[int, ...], float]()
        for i, kept in enumerate(sets):
            at_exit = left[i][:, kept]
            mean = np.hstack([at_exit, n - at_exit.sum(1, keepdims=True)]) @ costs_with(stage, own, [*kept]) / n
            cost[kept] = float(mean[wrong[i] <= eps * n].min())
        agreement = 1 - wrong[: len(names), -1] / n  # of a single exit at which all leave
        return choose(names, agreement, stage, own, lambda few: [cost[tuple(kept)] for kept in few])

    def _trials(self, cascade: Cascade, sets: list[tuple[int, ...]]) -> tuple[np.ndarray, np.ndarray, int]:
        """With each set of exits and each of `TRIALS`: images that leave at every exit, (Q, T, E), and that disagree,
        (Q, T); and their number."""
        e = len(cascade.rules)
        settings = np.full((len(sets), len(TRIALS), e), np.inf, dtype=np.float32)
        for i, kept in enumerate(sets):
            settings[i][:, kept] = TRIALS[:, None]
        flat = settings.reshape(-1, e)
        told = self.shared.told(cascade, list(range(e))) | {"settings": flat}
        answers = self.tally.of_each("trials", told, lambda a, s: check_trials(a, s, len(flat), e)).values()
        left, wrong = (np.sum([a[name] for a in answers], axis=0, dtype=np.int64) for name in ("left", "wrong"))
        n = sum(int(a["n"]) for a in answers)
        return left.reshape(settings.shape), wrong.reshape(settings.shape[:2]), n

    def _rows(self, cascade: Cascade, kept: list[int]) -> Recorded:
        told, k = self.shared.told(cascade, kept), self.shared.settings.k
        answers = self.tally.of_each("rows", told, lambda a, s: check_rows(a, s, len(kept), k))
        return Recorded.joined([Recorded(a["labels"], a["scores"], a["final"]) for a in answers.values()])

    def _path(self, cascade: Cascade, kept: list[int]) -> ThresholdPath:
        """Settings to be tried on images that certify."""
        settings, (e, k) = self.shared.settings, cascade.thresholds.shape
        if self.how.thresholds == "rows":
            return path_from(cascade, self._rows(cascade, kept), settings)
        surest_first = 1 / (1 + np.exp(-np.linspace(FAR, -FAR / 4, self.how.settings - 1)))
        thresholds = np.array([np.inf, *surest_first], dtype=np.float32)
        path = np.broadcast_to(thresholds[:, None, None], (len(thresholds), e, k)).copy()
        costs = leaving_costs(cascade, settings.calibration.cost, range(e))
        return ThresholdPath(cascade, path, Recorded.empty(e), costs)

    def _certified(self, path: ThresholdPath, kept: list[int]) -> tuple[tuple[Cascade, Certificate], SettingCounts]:
        how, settings, (s, e, k) = self.how, self.shared.settings, path.settings.shape
        told = self.shared.told(path.cascade, kept)
        told["settings"] = path.settings if how.thresholds == "rows" else path.settings[:, :, 0].copy()
        answers = self.tally.of_each("counts", told, lambda a, sizes: check_counts(a, sizes, s, e, k))
        each = {client: widened(answer) for client, answer in answers.items()}
        counts, eps, delta = reduce(add, each.values()), settings.max_disagreement, 1 - settings.confidence
        own, trim = list(each.values()), math.ceil(how.trim * len(each))
        tests = max(1, len(own)) if how.guarantee == "client" else 1

        def outcome(trim: int) -> tuple[int, Certificate]:
            client = how.guarantee == "client"
            passes = client_passes(own, eps, delta) if client else mixture_passes(own, eps, delta, trim)
            return certify(path.settings, counts, path.costs, eps, settings.confidence, how.guarantee, passes, tests)

        setting, certificate = outcome(trim)
        report = self.tally.report
        report.guarantee, report.cost, report.cost_untrimmed = how.guarantee, certificate.cost, outcome(0)[1].cost
        for client, one in each.items():
            row, wrong = self.tally.rows[client], int(one.disagreements[setting])
            row.n, row.disagreements, row.bound = one.n, wrong, upper_bound(wrong, one.n, settings.confidence)
            row.early = float(one.left[setting].sum() / one.n) if one.n else 0.0
        return (path.cascade.at(path.settings[setting]), certificate), counts


def _told_final(final: Final) -> Arrays:
    return {"centroids": final.centroids.cpu().numpy()} if isinstance(final, FinalClusters) else {}


def _least(losses: np.ndarray) -> float:
    """Where the losses on the grid of log temperatures are least, by a parabola through the three lowest."""
    i = int(losses.argmin())
    if not 0 < i < len(losses) - 1:
        return float(LOG_TEMPERATURES[i])
    a, b, c = losses[i - 1 : i + 2]
    bend = a - 2 * b + c
    step = float(LOG_TEMPERATURES[1] - LOG_TEMPERATURES[0])
    return float(LOG_TEMPERATURES[i]) + (0.5 * step * (a - c) / bend if bend > 0 else 0.0)


def _trimmed_scatter(
    answers: list[Arrays], scatters: list[np.ndarray], i: int, sums: np.ndarray, trim: float
) -> np.ndarray:
    """A scatter, (D, D), that with trimmed sums, (K, D), leaves the trimmed mean of what clients' images scatter about
    the clients' own means of clusters, less its negative eigenvalues."""
    counts, own = (np.stack([a[f"{name}_{i}"] for a in answers]) for name in ("counts", "sums"))
    within = np.stack([t - s.T @ _means(s, c) for t, s, c in zip(scatters, own, counts, strict=True)])
    (mean,) = trimmed(within[:, None], counts.sum(1, keepdims=True), trim)
    values, vectors = np.linalg.eigh(mean)
    return np.asarray((vectors * values.clip(min=0)) @ vectors.T + sums.T @ _means(sums, counts.sum(0)))


def _means(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    return np.asarray(sums / np.maximum(counts, 1)[:, None])
