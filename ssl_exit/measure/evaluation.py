"""What early exit did to a set of images: agreement, cost, and where images left."""

import copy
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch

from ssl_exit.cascade.result import ExitResult
from ssl_exit.cascade.run import Run
from ssl_exit.cascade.times import now, stage_times
from ssl_exit.data.images import Batch
from ssl_exit.data.transfer import on_device
from ssl_exit.encoders.opaque import features_of
from ssl_exit.errors import InputError
from ssl_exit.exits.final import FinalClasses
from ssl_exit.measure.metrics import against_targets, agreement
from ssl_exit.measure.seconds import segment_seconds
from ssl_exit.model import Model


@dataclass(frozen=True)
class ExitShare:
    """What left at one exit.

    Attributes:
        name: of the exit point; "end" for the end of the encoder.
        cost: multiply-adds spent when leaving here / those of the full encoder.
        share: of all usable images, how many left here.
        agreement: of those, how many got the full encoder's label; NaN if none left.
    """

    name: str
    cost: float
    share: float
    agreement: float


@dataclass(frozen=True)
class Evaluation:
    """Early exit beside the full encoder, on the same images in the same run.

    Attributes:
        n: images that could be used.
        agreement: share of them whose label equals the full encoder's.
        cost_macs: multiply-adds / those of the full encoder, exits' own included.
        cost_time: seconds / those of the full encoder, decoding left out of both.
        cost_time_predicted: what the measured time of every segment says of where images left.
        time_of_exits: of that, what exits' own work takes; the rest is stages.
        images_per_second: with early exit.
        images_per_second_full: of the full encoder.
        agreement_float32: share of images whose label by the full encoder is the same in float32; 1 where that is what
            it runs in.
        metrics: acc, nmi, ari of the early-exit labels and acc_full, nmi_full, ari_full of the full
            encoder's; empty without ground truth.
        exits: one row an exit, and the end.
        teaching_seconds: spent on fronts in fit(); 0 without.
        result: what became of each image.
        full_labels: labels of the full encoder, (N,).
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
    teaching_seconds: float
    result: ExitResult
    full_labels: np.ndarray

    @property
    def break_even(self) -> float:
        """Images after which the time that early exit saves has paid for teaching the fronts; inf if it saves none."""
        saved = 1 / self.images_per_second_full - 1 / self.images_per_second
        return self.teaching_seconds / saved if saved > 0 else float("inf")

    @property
    def verdict(self) -> str:
        """Whether exits pay in time here, and why or why not."""
        stages = 1 - (self.cost_time_predicted - self.time_of_exits)
        rest = self.cost_time - self.cost_time_predicted
        why = (
            f"images that leave early save {stages:.1%} of the full encoder's time, exits' own work takes "
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
            "skipped": self.result.n_skipped,
            "agreement": self.agreement,
            "cost_macs": self.cost_macs,
            "cost_time": self.cost_time,
            "cost_time_predicted": self.cost_time_predicted,
            "time_of_exits": self.time_of_exits,
            "images_per_second": self.images_per_second,
            "images_per_second_full": self.images_per_second_full,
            "agreement_float32": self.agreement_float32,
            **self.metrics,
            "teaching_seconds": self.teaching_seconds,
            "break_even": self.break_even if np.isfinite(self.break_even) else None,
            "exits": rows,
        }


def evaluate(
    model: Model, batches: Iterable[Batch], n: int, batch_size: int, targets: np.ndarray | None = None
) -> Evaluation:
    """Run the full encoder and the cascade over the same batches, in turns, and compare.

    Args:
        model: a fitted one.
        batches: images with positions 0 to n - 1.
        n: how many there are.
        batch_size: images a segment runs on at a time.
        targets: ground truth, (n,), for ACC (accuracy in the supervised mode), NMI and ARI; used here only.

    Raises:
        InputError: no image can be used.
    """
    cascade = model.cascade
    device = cascade.device
    exact = None if cascade.tapped.dtype == torch.float32 else copy.deepcopy(model.encoder).to(device)
    runs = {"early": Run(model.plan, n, batch_size), "full": Run(model.full_plan, n, batch_size)}
    seconds = dict.fromkeys(runs, 0.0)
    in_float32 = np.full(n, -1, dtype=np.int64)
    times: _Times | None = None
    for i, batch in enumerate(on_device(batches, device)):
        if times is None and len(batch.indices):
            times = _warm_up(model, batch, n, batch_size)
        for name in list(runs)[:: 1 if i % 2 else -1]:  # take turns at going first
            own = replace(batch, images=batch.images.clone())  # an encoder may change it in place
            start = now(device)
            runs[name].push(own)
            seconds[name] += now(device) - start
        if exact is not None and len(batch.indices):
            with torch.inference_mode():
                images = batch.images.to(device)
                features = cascade.tapped.output(features_of(exact(images), images))
                in_float32[batch.indices.numpy()] = cascade.final(features).cpu().numpy()
    results = {}
    for name, current in runs.items():
        start = now(device)
        results[name] = current.finish()
        seconds[name] += now(device) - start

    result, full = results["early"], results["full"].labels
    good = result.labels >= 0
    if not good.any() or times is None:
        raise InputError(f"none of the {n} images can be used; the first: {result.skipped[min(result.skipped)]}")
    metrics: dict[str, float] = {}
    if targets is not None:
        classes = isinstance(cascade.final, FinalClasses)
        metrics = against_targets(result.labels[good], targets[good], classes)
        metrics |= {f"{k}_full": v for k, v in against_targets(full[good], targets[good], classes).items()}
    rows = []
    for e, (name, cost) in enumerate(zip(cascade.exit_names, model.plan.costs, strict=True)):
        here = good & (result.exits == e)
        same = agreement(result.labels[here], full[here]) if here.any() else float("nan")
        rows.append(ExitShare(name, float(cost), float(here[good].mean()), same))
    count = int(good.sum())
    reached = np.array([(result.exits[good] >= e).mean() for e in range(len(rows))])
    starts = [segment.stages.start for segment in model.plan.segments]
    return Evaluation(
        n=count,
        agreement=agreement(result.labels[good], full[good]),
        cost_macs=float(result.cost[good].mean()),
        cost_time=seconds["early"] / seconds["full"],
        cost_time_predicted=float(times.segments @ reached[starts]) / times.full,
        time_of_exits=float(times.exits[:-1] * model.plan.used @ reached[:-1]) / times.full,
        images_per_second=count / seconds["early"],
        images_per_second_full=count / seconds["full"],
        agreement_float32=1.0 if exact is None else agreement(in_float32[good], full[good]),
        metrics=metrics,
        exits=rows,
        teaching_seconds=sum(one.seconds for one in model.provenance.teaching),
        result=result,
        full_labels=full,
    )


@dataclass(frozen=True)
class _Times:
    """Seconds of a full batch: of every segment, of every exit's own work, and of the full encoder."""

    segments: np.ndarray
    exits: np.ndarray
    full: float


def _warm_up(model: Model, batch: Batch, n: int, batch_size: int) -> _Times:
    """Run everything once outside the clock, and measure its parts, on a full batch: programs are compiled for its
    shape."""
    positions = torch.arange(min(n, batch_size))
    repeated = batch.images[(positions % len(batch.indices)).to(batch.images.device)]
    for plan in (model.plan, model.full_plan):
        Run(plan, n, batch_size).push(Batch(positions, repeated.clone()))
    segments, full = segment_seconds(model.plan, model.full_plan, repeated, batch_size)
    cascade = model.cascade
    own = stage_times(cascade.tapped, cascade.rules, cascade.final, repeated).exits[-1]
    return _Times(segments, own, full)
