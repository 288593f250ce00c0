"""Runs stages and exits, and stops early: images that leave an exit are never computed further.

Images in a stream wait in one queue a stage. A stage runs as soon as its queue holds a full batch, the
deepest first, so every stage runs at one shape and memory stays below two batches a stage; what is left is
flushed at the end. A single batch goes through directly, its survivors compacted after every stage.
"""

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ssl_exit.data.images import Batch
from ssl_exit.encoders.tapped import TappedEncoder
from ssl_exit.exits.across import AcrossExits
from ssl_exit.exits.final import Final
from ssl_exit.exits.rules import ExitRule
from ssl_exit.exits.thresholds import Recorded

NOT_FINITE = "pixels or features are NaN or infinite"


@dataclass(frozen=True)
class ExitResult:
    """What became of each image, in input order.

    Attributes:
        labels: final cluster, (N,) int64; -1 for an image that could not be used.
        exits: index of the exit it left at, (N,) int64; the number of exits means the end.
        scores: its score there, (N,) float32; 1 at the end, NaN for an image that could not be used.
        cost: multiply-adds spent on it, exits' own included / those of the whole encoder, (N,) float64; NaN
            for an image that could not be used.
        skipped: position and reason of every image that could not be used.
        audited: label of the whole encoder for images that left early and went on to the end all the same, (N,) int64;
            -1 for all others.
    """

    labels: np.ndarray
    exits: np.ndarray
    scores: np.ndarray
    cost: np.ndarray
    skipped: dict[int, str]
    audited: np.ndarray


class Cascade(nn.Module):
    """Stages, exits and thresholds.

    Attributes:
        tapped: the staged encoder and its descriptors.
        rules: one fitted rule for each exit.
        final: what gives the whole encoder's label, such as the final clusters.
        across: patience and ensembling over exits.
        thresholds: leave at exit e with label k if score >= thresholds[e, k]; (E, K), inf = never.
    """

    thresholds: Tensor

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

    @property
    def exit_rules(self) -> list[ExitRule]:
        """The rule at each exit."""
        return list(self.rules)  # type: ignore[arg-type]

    @property
    def costs(self) -> np.ndarray:
        """Multiply-adds spent when leaving at each exit and at the end / the whole encoder's, (E + 1,)."""
        return exit_costs(self.tapped, self.exit_rules, self.final)

    @property
    def settings(self) -> dict[str, Any]:
        """What else decides where an image leaves and with which label."""
        return {
            "exits": [point.name for point in self.tapped.staged.exit_points],
            "descriptors": [(d.kind, d.normalize) for d in self.tapped.descriptors],
            "accumulate": self.tapped.accumulate,
            "patience": self.across.patience,
            "ensemble": self.across.ensemble,
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
        run = Run(self, n, batch_size, audit)
        for batch in batches:
            run.push(batch)
        return run.finish()

    def full(self, batches: Iterable[Batch], n: int) -> tuple[np.ndarray, dict[int, str]]:
        """Labels of the whole encoder, (n,) int64, -1 for an image that could not be used, and why not."""
        labels = np.full(n, -1, dtype=np.int64)
        skipped: dict[int, str] = {}
        for batch in batches:
            skipped.update(batch.skipped)
            if len(batch.indices):
                labels[batch.indices.numpy()] = self.labels(batch.images).cpu().numpy()
        return labels, skipped | _not_finite(labels, skipped)

    @torch.inference_mode()
    def labels(self, images: Tensor) -> Tensor:
        """Labels of the whole encoder for one batch, (N,) int64; -1 where pixels or features are not finite."""
        x = self._to_device(images)
        labels = self.final(self.tapped.output(self.tapped.staged(x)))
        return torch.where(finite_images(x), labels, -1)

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

    def fit_temperatures(self, logits: Tensor, final: Tensor) -> tuple[Recorded, np.ndarray]:
        """Set the temperature of every rule; logits (n, E, width), final labels (n,).

        Returns:
            The labels and scores of those images under the new temperatures, and the mean probabilities at each
            exit by final cluster, (E, K, K), a row a cluster; uniform where a cluster has no image.
        """
        e, k = self.thresholds.shape
        labels, scores = torch.zeros(len(final), e, dtype=torch.int64), torch.zeros(len(final), e)
        means = torch.full((e, k, k), 1 / k)
        carried = self.across.begin(len(final), k, torch.device("cpu"))
        for i, rule in enumerate(self.exit_rules if len(final) else []):
            rule = copy.deepcopy(rule).cpu()
            rule.fit_temperature(logits[:, i], final)
            self.exit_rules[i].load_state_dict(rule.state_dict())
            labels[:, i], scores[:, i], carried = self.across.decide(rule, logits[:, i], carried, i)
            p = rule.log_probabilities(logits[:, i]).exp()
            for cluster in final.unique():
                means[i, cluster] = p[final == cluster].mean(0)
        return Recorded(labels.numpy(), scores.numpy(), final.numpy()), means.numpy()

    def with_own_rules(self) -> "Cascade":
        """The same encoder with copies of the rules, and thresholds that let nothing exit."""
        fresh = Cascade(self.tapped, copy.deepcopy(self.exit_rules), self.final, self.across)
        return fresh.to(self.thresholds.device)

    def _visits(
        self, batches: Iterable[Batch], skipped: dict[int, str]
    ) -> Iterator[tuple[slice, list[Tensor], Tensor]]:
        """Per batch: rows so far, logits at every exit, (N, K) each, and labels at the end, (N,)."""
        at = 0
        for batch in batches:
            skipped.update(batch.skipped)
            if len(batch.indices) == 0:
                continue
            rows = slice(at, at := at + len(batch.indices))
            with torch.inference_mode():
                images = self._to_device(batch.images)
                described, features = self.tapped(images)
                columns = zip(self.exit_rules, self.tapped.columns, strict=True)
                logits = [rule.logits(described[:, seen]) for rule, seen in columns]
                final = torch.where(finite_images(images), self.final(features), -1)
            skipped.update(dict.fromkeys(batch.indices[final.cpu() < 0].tolist(), NOT_FINITE))
            yield rows, logits, final

    def _to_device(self, images: Tensor) -> Tensor:
        return images.to(self.thresholds.device, non_blocking=True)


class Run:
    """One pass over images: the queues, and the results as they come in."""

    def __init__(self, cascade: Cascade, n: int, batch_size: int, audit: np.ndarray | None = None) -> None:
        self.cascade, self.n, self.batch_size = cascade, n, batch_size
        device = cascade.thresholds.device
        self.stages = len(cascade.tapped.staged.stages)
        self.queues: list[_Queue] = [_Queue(2 * batch_size) for _ in range(self.stages)]
        self.labels = torch.full((n,), -1, dtype=torch.int64, device=device)
        self.exits = torch.full((n,), self.stages - 1, dtype=torch.int64, device=device)
        self.scores = torch.full((n,), torch.nan, device=device)
        self.audit = None if audit is None else torch.from_numpy(audit).to(device)
        self.audited = torch.full((n,), -1, dtype=torch.int64, device=device)
        self.skipped: dict[int, str] = {}

    @torch.inference_mode()
    def push(self, batch: Batch) -> None:
        """Take in one batch and run whatever stages it fills."""
        self.skipped.update(batch.skipped)
        if len(batch.indices) == 0:
            return
        images = self.cascade._to_device(batch.images)
        carried = self.cascade.across.begin(len(images), self.cascade.final.n_clusters, images.device)
        entering = _Wave(images, images.new_empty(len(images), 0), carried, batch.indices.to(images.device))
        finite = finite_images(images)
        if not bool(finite.all()):
            entering = entering.at(finite.nonzero()[:, 0])
        if self.n == len(batch.indices) <= self.batch_size:
            self._through(entering)
            return
        if len(entering.indices) == self.batch_size:
            self._advance(0, entering)  # a full batch need not wait
        else:
            self.queues[0].put(entering)
        self._drain()

    @torch.inference_mode()
    def finish(self) -> ExitResult:
        """Flush the queues and hand out the result."""
        for i in range(self.stages):
            if len(self.queues[i]):
                self._advance(i, self.queues[i].take(self.batch_size))
                self._drain()
        labels, exits, scores = (t.cpu().numpy() for t in (self.labels, self.exits, self.scores))
        audited = self.audited.cpu().numpy()
        cost = np.where(labels >= 0, self.cascade.costs[np.where(audited >= 0, self.stages - 1, exits)], np.nan)
        return ExitResult(labels, exits, scores, cost, self.skipped | _not_finite(labels, self.skipped), audited)

    def _drain(self) -> None:
        """Run full batches, the deepest first, until every queue holds less than one."""
        while (ready := max((i for i, q in enumerate(self.queues) if len(q) >= self.batch_size), default=-1)) >= 0:
            self._advance(ready, self.queues[ready].take(self.batch_size))

    def _advance(self, stage: int, wave: "_Wave") -> None:
        """Run a stage on at most one batch and queue the survivors."""
        survivors = self._step(stage, wave)
        if survivors is not None:
            self.queues[stage + 1].put(*survivors)

    def _through(self, wave: "_Wave") -> None:
        """Take one batch to the end, its survivors compacted after every stage."""
        for stage in range(self.stages):
            if len(wave.indices) == 0:
                return
            survivors = self._step(stage, wave)
            if survivors is None:
                return
            after, rows = survivors
            wave = after if rows is None else after.at(rows)

    def _step(self, stage: int, wave: "_Wave") -> "tuple[_Wave, Tensor | None] | None":
        """Run one stage and its exit; who leaves is written down. Returns the wave and the rows that go on."""
        tapped = self.cascade.tapped
        x = tapped.staged.stages[stage](wave.x)
        if stage == self.stages - 1:
            labels, indices = self.cascade.final(tapped.output(x)), wave.indices
            if self.audit is not None:
                left = self.exits[indices] < stage
                self.audited[indices[left]] = labels[left]
                labels, indices = labels[~left], indices[~left]
            self.labels[indices] = labels
            self.scores[indices] = torch.where(labels >= 0, 1.0, torch.nan)
            return None
        own = tapped.descriptors[stage](x)
        described = torch.cat([wave.described, own], dim=1) if tapped.accumulate else own
        rule = self.cascade.exit_rules[stage]
        labels, scores, carried = self.cascade.across.decide(rule, rule.logits(described), wave.carried, stage)
        leaves = scores >= self.cascade.thresholds[stage, labels]
        stays = ~leaves
        if self.audit is not None:
            leaves &= self.exits[wave.indices] == self.stages - 1  # once only
            stays = ~leaves | self.audit[wave.indices]
        gone = leaves.nonzero()[:, 0]  # here the host waits for the device
        after = _Wave(x, described if tapped.accumulate else wave.described, carried, wave.indices)
        if len(gone) == 0:
            return after, None
        left = wave.indices[gone]
        self.labels[left], self.scores[left], self.exits[left] = labels[gone], scores[gone], stage
        return after, stays.nonzero()[:, 0]


@dataclass(frozen=True)
class _Wave:
    """Images on their way: the tensor at an exit point, descriptors so far, what exits carry on, and positions."""

    x: Tensor
    described: Tensor
    carried: Tensor
    indices: Tensor

    def at(self, rows: Tensor) -> "_Wave":
        return _Wave(self.x[rows], self.described[rows], self.carried[rows], self.indices[rows])


class _Queue:
    """Survivors waiting for a stage, in arrays allocated once: small tensors kept alive fragment the heap."""

    def __init__(self, capacity: int) -> None:
        self.capacity, self.filled = capacity, 0
        self.arrays: list[Tensor] = []

    def __len__(self) -> int:
        return self.filled

    def put(self, wave: _Wave, rows: Tensor | None = None) -> None:
        """Copy the given rows of a wave (or all) in."""
        parts = (wave.x, wave.described, wave.carried, wave.indices)
        if not self.arrays:
            self.arrays = [part.new_empty(self.capacity, *part.shape[1:]) for part in parts]
        count = len(wave.indices) if rows is None else len(rows)
        for array, part in zip(self.arrays, parts, strict=True):
            target = array[self.filled : self.filled + count]
            if rows is None:
                target.copy_(part)
            else:
                torch.index_select(part, 0, rows, out=target)
        self.filled += count

    def take(self, most: int) -> _Wave:
        """The last images put in, at most `most`; to be used before the next `put`."""
        first = max(0, self.filled - most)
        wave = _Wave(*(array[first : self.filled] for array in self.arrays))
        self.filled = first
        return wave


def exit_costs(tapped: TappedEncoder, rules: Sequence[ExitRule], final: Final) -> np.ndarray:
    """Multiply-adds spent when leaving at each exit and at the end / the whole encoder's, (E + 1,)."""
    whole = sum(tapped.staged.macs) + final.macs
    own = [d.macs + rule.macs for d, rule in zip(tapped.descriptors, rules, strict=True)]
    work = [stage + exit_ for stage, exit_ in zip(tapped.staged.macs, [*own, final.macs], strict=True)]
    return np.cumsum(work) / whole


def finite_images(images: Tensor) -> Tensor:
    """Which images have finite pixels only: (N, C, H, W) -> (N,) bool."""
    return images.flatten(1).sum(1).isfinite()


def _not_finite(labels: np.ndarray, known: dict[int, str]) -> dict[int, str]:
    return {int(i): NOT_FINITE for i in np.flatnonzero(labels < 0) if int(i) not in known}
