"""What early exit did to a set of images: agreement, cost, and where images left."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from ssl_exit.cascade import Cascade
from ssl_exit.data.images import Batch
from ssl_exit.data.transfer import on_device
from ssl_exit.engine import ExitResult, Run
from ssl_exit.errors import InputError
from ssl_exit.exits.final import FinalClasses
from ssl_exit.measure.metrics import against_targets, agreement
from ssl_exit.memory import kept_memory
from ssl_exit.timing import now, segment_seconds, stage_times


@dataclass(frozen=True)
class ExitShare:
    """What left at one exit.

    Attributes:
        name: of the exit point; "end" for the end of the encoder.
        cost: multiply-adds spent when leaving here / those of the whole encoder.
        share: of all usable images, how many left here.
        agreement: of those, how many got the whole encoder's label; NaN if none left.
    """

    name: str
    cost: float
    share: float
    agreement: float


@dataclass(frozen=True)
class Evaluation:
    """Early exit beside the whole encoder, on the same images in the same run.

    Attributes:
        n: images that could be used.
        agreement: share of them whose label equals the whole encoder's.
        cost_macs: multiply-adds / those of the whole encoder, exits' own included.
        cost_time: seconds / those of the whole encoder, decoding left out of both.
        cost_time_predicted: what the measured time of every segment says of where images left.
        time_of_exits: of that, what exits' own work takes; the rest is stages.
        images_per_second: with early exit.
        images_per_second_full: of the whole encoder.
        agreement_float32: share of images whose label by the whole encoder is the same in float32; 1 where that is what
            it runs in.
        metrics: acc, nmi, ari of the early-exit labels and acc_full, nmi_full, ari_full of the whole
            encoder's; empty without ground truth.
        exits: one row an exit, and the end.
        result: what became of each image.
        full_labels: labels of the whole encoder, (N,).
    """

    n: int
    agreement: float
    cost_macs: float
    cost_time: float
    cost_time_predicted: float
    time_of_exits: float
    images_per_second: float
    images_per_second_full: float
    agreement_float32: float
    metrics: dict[str, float]
    exits: list[ExitShare]
    result: ExitResult
    full_labels: np.ndarray

    @property
    def verdict(self) -> str:
        """Whether exits pay in time here, and why or why not."""
        stages = 1 - (self.cost_time_predicted - self.time_of_exits)
        rest = self.cost_time - self.cost_time_predicted
        why = (
            f"images that leave early save {stages:.1%} of the whole encoder's time, exits' own work takes "
            f"{self.time_of_exits:.1%}, queues and moving {max(rest, 0):.1%}"
        )
        if self.cost_time < 1:
            return f"exits pay: {why}"
        remedy = "allow more disagreement, train the encoder for exits (docs/training.md)"
        return f'exits do not pay here: {why}; {remedy}, or fit with cost="time", which leaves out exits that cost more'

    def to_dict(self) -> dict[str, Any]:
        """Everything but the labels of single images, ready for JSON (NaN becomes None)."""
        rows = [{k: None if v != v else v for k, v in asdict(row).items()} for row in self.exits]
        return {
            "n": self.n,
            "skipped": len(self.result.skipped),
            "agreement": self.agreement,
            "cost_macs": self.cost_macs,
            "cost_time": self.cost_time,
            "cost_time_predicted": self.cost_time_predicted,
            "time_of_exits": self.time_of_exits,
            "images_per_second": self.images_per_second,
            "images_per_second_full": self.images_per_second_full,
            "agreement_float32": self.agreement_float32,
            **self.metrics,
            "exits": rows,
        }


@kept_memory()
def evaluate(
    cascade: Cascade,
    batches: Iterable[Batch],
    n: int,
    batch_size: int,
    targets: np.ndarray | None = None,
    exact: nn.Module | None = None,
) -> Evaluation:
    """Run the whole encoder and the cascade over the same batches, in turns, and compare.

    Args:
        cascade: a fitted one.
        batches: images with positions 0 to n - 1.
        n: how many there are.
        batch_size: images a stage runs on at a time.
        targets: ground truth, (n,), for ACC (accuracy in the supervised mode), NMI and ARI; used here only.
        exact: the encoder in float32 on the cascade's device, if the cascade runs in anything else.

    Raises:
        InputError: no image can be used.
    """
    device = cascade.thresholds.device
    run = Run(cascade, n, batch_size)
    full, in_float32 = np.full(n, -1, dtype=np.int64), np.full(n, -1, dtype=np.int64)
    seconds = {"early": 0.0, "full": 0.0}
    segments, own, whole_seconds = np.ones(len(run.segments)), np.zeros(len(cascade.rules) + 1), 1.0

    def whole(batch: Batch) -> None:
        if len(batch.indices):
            full[batch.indices.numpy()] = cascade.labels(batch.images, batch_size).cpu().numpy()

    warm = False
    for i, batch in enumerate(on_device(batches, device)):
        if not warm and len(batch.indices):  # once outside the clock
            positions = torch.arange(min(n, batch_size))  # a full batch: programs are compiled for its shape
            repeated = (positions % len(batch.indices)).to(device)
            warming = Batch(positions, batch.images[repeated])  # a copy: an encoder may change it in place
            Run(cascade, n, batch_size).push(warming)
            segments, whole_seconds = segment_seconds(cascade, warming.images, batch_size)
            own = stage_times(cascade, warming.images).exits[-1]
            warm = True
        steps = {"early": run.push, "full": whole}
        for name in list(steps)[:: 1 if i % 2 else -1]:  # take turns at going first
            own_copy = replace(batch, images=batch.images.clone())
            start = now(device)
            steps[name](own_copy)
            seconds[name] += now(device) - start
        if exact is not None and len(batch.indices):
            with torch.inference_mode():
                features = cascade.tapped.output(exact(batch.images.to(device)))
                in_float32[batch.indices.numpy()] = cascade.final(features).cpu().numpy()
    start = now(device)
    result = run.finish()
    seconds["early"] += now(device) - start

    good = result.labels >= 0
    if not good.any():
        raise InputError(f"none of the {n} images can be used; the first: {result.skipped[min(result.skipped)]}")
    metrics: dict[str, float] = {}
    if targets is not None:
        classes = isinstance(cascade.final, FinalClasses)
        metrics = against_targets(result.labels[good], targets[good], classes)
        metrics |= {f"{k}_full": v for k, v in against_targets(full[good], targets[good], classes).items()}
    names = [point.name for point in cascade.tapped.staged.exit_points] + ["end"]
    rows = []
    for e, (name, cost) in enumerate(zip(names, run.plan.costs, strict=True)):
        here = good & (result.exits == e)
        same = agreement(result.labels[here], full[here]) if here.any() else float("nan")
        rows.append(ExitShare(name, float(cost), float(here[good].mean()), same))
    count = int(good.sum())
    reached = np.array([(result.exits[good] >= e).mean() for e in range(len(names))])
    starts = [segment.stages.start for segment in run.segments]
    return Evaluation(
        n=count,
        agreement=agreement(result.labels[good], full[good]),
        cost_macs=float(result.cost[good].mean()),
        cost_time=seconds["early"] / seconds["full"],
        cost_time_predicted=float(segments @ reached[starts]) / whole_seconds,
        time_of_exits=float(own[:-1] * run.plan.used @ reached[:-1]) / whole_seconds,
        images_per_second=count / seconds["early"],
        images_per_second_full=count / seconds["full"],
        agreement_float32=1.0 if exact is None else agreement(in_float32[good], full[good]),
        metrics=metrics,
        exits=rows,
        result=result,
        full_labels=full,
    )
