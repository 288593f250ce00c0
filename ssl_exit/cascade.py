"""Stages, exits and thresholds joined: what leaves where, and what it costs."""

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ssl_exit.data.images import Batch
from ssl_exit.data.transfer import on_device
from ssl_exit.encoders.compiling import call_compiled, compile_for_inference, without_compiling
from ssl_exit.encoders.tapped import TappedEncoder
from ssl_exit.engine import (
    NOT_FINITE,
    ExitResult,
    Plan,
    Run,
    Segment,
    finite_images,
    not_finite,
    run_one,
    segments,
    used_exits,
)
from ssl_exit.exits.across import AcrossExits
from ssl_exit.exits.final import Final
from ssl_exit.exits.rules import ExitRule
from ssl_exit.exits.thresholds import Recorded
from ssl_exit.memory import kept_memory
from ssl_exit.timing import StageTimes


class Cascade(nn.Module):
    """Stages, exits and thresholds.

    Attributes:
        tapped: the staged encoder and its descriptors.
        rules: one fitted rule for each exit.
        final: what gives the whole encoder's label, such as the final clusters.
        across: patience and ensembling over exits.
        thresholds: leave at exit e with label k if score >= thresholds[e, k]; (E, K), inf = never.
        times: of stages and exits, as measured; None: not yet.
        compiles: whether full batches run through torch.compile; turned off, with a warning, where that fails.
    """

    thresholds: Tensor
    times: StageTimes | None = None
    compiles = False

    def __init__(
        self, tapped: TappedEncoder, rules: Iterable[ExitRule], final: Final, across: AcrossExits | None = None
    ) -> None:
        super().__init__()
        self.tapped = tapped
        self.rules = nn.ModuleList(rules)
        self.final = final
        self.across = across or AcrossExits()
        shape = (len(self.rules), final.n_clusters)
        self.register_buffer("thresholds", torch.full(shape, torch.inf))
        self._plans: dict[tuple[bool, ...], Plan] = {}

    @property
    def exit_rules(self) -> list[ExitRule]:
        """The rule at each exit."""
        return list(self.rules)  # type: ignore[arg-type]

    @property
    def costs(self) -> np.ndarray:
        """Multiply-adds spent when leaving at each exit and at the end / the whole encoder's, (E + 1,).

        Every exit does its work.
        """
        return exit_costs(self.tapped, self.exit_rules, self.final)

    def plan(self, live: Sequence[bool] | None = None) -> Plan:
        """What is run with the thresholds as they are, or where these exits let images leave; made once for each."""
        key = tuple((self.thresholds <= 1).any(1).tolist() if live is None else live)
        if key not in self._plans:
            used = used_exits(self, key)
            costs = exit_costs(self.tapped, self.exit_rules, self.final, used)
            self._plans[key] = Plan(segments(self, key), used, costs)
            for segment in self._plans[key].segments if self.compiles else []:
                compile_for_inference(segment, self.thresholds.device)
        return self._plans[key]

    def call(
        self, segment: Segment, x: Tensor, described: Tensor, carried: Tensor, *, compiled: bool
    ) -> tuple[Tensor, ...]:
        """Run one segment (see `Segment.forward`)."""
        thresholds = self.thresholds[slice(0) if segment.exit is None else segment.exit]
        if compiled and self.compiles:
            try:
                return call_compiled(segment, x, described, carried, thresholds)
            except Exception as error:  # whatever the compiler raises; what the images raise is raised again below
                found = segment.forward(x, described, carried, thresholds)
                without_compiling(error)
                self.compiles = False
                return found
        return segment.forward(x, described, carried, thresholds)

    def compacting_pays(self, segment: Segment, before: int, after: int) -> bool:
        """Whether to move survivors together before a segment: `after` of `before` images go on."""
        return self.times is None or self.times.compacting_pays(segment.stages, before, after)

    @property
    def settings(self) -> dict[str, Any]:
        """What else decides where an image leaves and with which label."""
        return {
            "exits": [point.name for point in self.tapped.staged.exit_points],
            "descriptors": [(d.kind, d.normalize) for d in self.tapped.descriptors],
            "accumulate": self.tapped.accumulate,
            "patience": self.across.patience,
            "ensemble": self.across.ensemble,
            "precision": str(self.tapped.dtype),
            "final": [type(self.final).__name__, getattr(self.final, "spherical", None)],
        }

    def exits_state(self) -> dict[str, Tensor]:
        """Everything but the encoder, by name: rules, what gives the final label, thresholds."""
        state = {f"rules.{k}": v for k, v in self.rules.state_dict().items()}
        state |= {f"final.{k}": v for k, v in self.final.state_dict().items()}
        return state | {"thresholds": self.thresholds}

    def run(self, batches: Iterable[Batch], n: int, batch_size: int, audit: np.ndarray | None = None) -> ExitResult:
        """Cluster images with early exits.

        Args:
            batches: images with positions 0 to n - 1, each at most once.
            n: how many images there are in all.
            batch_size: images a stage runs on at a time.
            audit: which images go on to the end wherever they leave, (n,) bool; None: none.

        Returns:
            Labels, exits, scores and cost of every image, in the order of its position.
        """
        arriving = on_device(batches, self.thresholds.device)
        if n == 1 < batch_size:
            (batch,) = arriving
            return run_one(self, batch, audit is not None and bool(audit[0]))
        with kept_memory() if n > batch_size else nullcontext():
            run = Run(self, n, batch_size, audit)
            for batch in arriving:
                run.push(batch)
            return run.finish()

    def full(self, batches: Iterable[Batch], n: int, batch_size: int) -> tuple[np.ndarray, dict[int, str]]:
        """Labels of the whole encoder, (n,) int64, -1 for an image that could not be used, and why not."""
        labels = np.full(n, -1, dtype=np.int64)
        skipped: dict[int, str] = {}
        with kept_memory() if n > batch_size else nullcontext():
            for batch in on_device(batches, self.thresholds.device):
                skipped.update(batch.skipped)
                if len(batch.indices):
                    labels[batch.indices.numpy()] = self.labels(batch.images, batch_size).cpu().numpy()
        return labels, skipped | not_finite(labels, skipped)

    @torch.inference_mode()
    def labels(self, images: Tensor, batch_size: int) -> Tensor:
        """Labels of the whole encoder for one batch, (N,) int64; -1 where pixels or features are not finite."""
        (whole,) = self.plan([False] * len(self.rules)).segments
        x, finite = self.tapped.enter(images), finite_images(images)
        nothing = torch.empty(len(x), 0, device=x.device)
        labels = self.call(whole, x, nothing, nothing, compiled=len(x) == batch_size)[3]
        return torch.where(finite.to(labels.device), labels, -1)

    @kept_memory()
    def record(self, batches: Iterable[Batch], n: int) -> tuple[Recorded, dict[int, str]]:
        """Labels and scores of n images at every exit, without leaving.

        Images that cannot be used drop out; their positions and the reasons are the second value.
        """
        e = len(self.rules)
        labels, scores = np.zeros((n, e), dtype=np.int64), np.full((n, e), np.nan, dtype=np.float32)
        final = np.full(n, -1, dtype=np.int64)
        skipped: dict[int, str] = {}
        for rows, each_exit, end in self._visits(batches, skipped):
            final[rows] = end.cpu().numpy()
            carried = self.across.begin(len(end), self.final.n_clusters, end.device)
            for i, (rule, logits) in enumerate(zip(self.exit_rules, each_exit, strict=True)):
                label, score, carried = self.across.decide(rule, logits, carried, i)
                labels[rows, i], scores[rows, i] = label.cpu().numpy(), score.cpu().numpy()
        good = final >= 0
        return Recorded(labels[good], scores[good], final[good]), skipped

    @kept_memory()
    def logits(self, batches: Iterable[Batch], n: int) -> tuple[Tensor, Tensor, dict[int, str]]:
        """Logits of n images at every exit, (n, E, width), and final labels, (n,); unusable images drop out."""
        logits = torch.full((n, len(self.rules), max((rule.width for rule in self.exit_rules), default=0)), torch.nan)
        final = torch.full((n,), -1)
        skipped: dict[int, str] = {}
        for rows, each_exit, end in self._visits(batches, skipped):
            final[rows] = end.cpu()
            for i, one in enumerate(each_exit):
                logits[rows, i] = one.cpu()
        good = (final >= 0) & logits.isfinite().flatten(1).all(1)
        return logits[good], final[good], skipped

    def fit_temperatures(self, logits: Tensor, final: Tensor) -> Recorded:
        """Set the temperature of every rule; logits (n, E, width), final labels (n,).

        Returns:
            The labels and scores of those images under the new temperatures.
        """
        e, k = self.thresholds.shape
        labels, scores = torch.zeros(len(final), e, dtype=torch.int64), torch.zeros(len(final), e)
        carried = self.across.begin(len(final), k, torch.device("cpu"))
        for i, rule in enumerate(self.exit_rules if len(final) else []):
            rule = copy.deepcopy(rule).cpu()
            rule.fit_temperature(logits[:, i], final)
            self.exit_rules[i].load_state_dict(rule.state_dict())
            labels[:, i], scores[:, i], carried = self.across.decide(rule, logits[:, i], carried, i)
        return Recorded(labels.numpy(), scores.numpy(), final.numpy())

    def mean_probabilities(self, logits: Tensor, final: Tensor) -> np.ndarray:
        """Mean probabilities at each exit by final cluster, (E, K, K), a row a cluster; uniform without images."""
        e, k = self.thresholds.shape
        means = torch.full((e, k, k), 1 / k)
        for i, rule in enumerate(self.exit_rules):
            p = copy.deepcopy(rule).cpu().log_probabilities(logits[:, i]).exp()
            for cluster in final.unique():
                means[i, cluster] = p[final == cluster].mean(0)
        return means.numpy()

    def with_own_rules(self, tapped: TappedEncoder | None = None) -> "Cascade":
        """The same encoder (or another) with copies of the rules, and thresholds that let nothing exit."""
        fresh = Cascade(tapped or self.tapped, copy.deepcopy(self.exit_rules), self.final, self.across)
        fresh.times, fresh.compiles = self.times, self.compiles
        return fresh.to(self.thresholds.device)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_plans": {}}  # programs are not copied

    def _visits(
        self, batches: Iterable[Batch], skipped: dict[int, str]
    ) -> Iterator[tuple[slice, list[Tensor], Tensor]]:
        """Per batch: rows so far, logits at every exit, (N, K) each, and labels at the end, (N,)."""
        at = 0
        for batch in on_device(batches, self.thresholds.device):
            skipped.update(batch.skipped)
            if len(batch.indices) == 0:
                continue
            rows = slice(at, at := at + len(batch.indices))
            with torch.inference_mode():
                finite = finite_images(batch.images)  # before an encoder changes them in place
                described, features = self.tapped(self.tapped.enter(batch.images))
                columns = zip(self.exit_rules, self.tapped.columns, strict=True)
                logits = [rule.logits(described[:, seen]) for rule, seen in columns]
                final = torch.where(finite.to(features.device), self.final(features), -1)
            skipped.update(dict.fromkeys(batch.indices[final.cpu() < 0].tolist(), NOT_FINITE))
            yield rows, logits, final


def exit_costs(
    tapped: TappedEncoder, rules: Sequence[ExitRule], final: Final, used: np.ndarray | None = None
) -> np.ndarray:
    """Multiply-adds spent when leaving at each exit and at the end / the whole encoder's, (E + 1,).

    Args:
        tapped, rules, final: of a cascade.
        used: exits that do their work, (E,) bool; None: all.
    """
    whole = sum(tapped.staged.macs) + final.macs
    own = np.array([d.macs + rule.macs for d, rule in zip(tapped.descriptors, rules, strict=True)], dtype=np.int64)
    own = own if used is None else own * used
    return np.cumsum(np.array(tapped.staged.macs) + np.append(own, final.macs)) / whole
