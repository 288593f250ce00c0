r"""Teaching a front the final clusters of an encoder, without labels.

With q(x) the soft assignment of the full encoder (`Final.soft`), its mean over the image and its mirror image where
these mean the same, f the front, W and b its head, and s = sharpness, what is minimised over f, W and b is

    H(q(x)^s / sum_k q_k(x)^s, softmax(W f(x') + b)),        x' a view of x: shifted, and mirrored half of the time

with H the cross-entropy. Where the encoder is asked again (`Front(match=True)`), q is its answer to x' itself, and
three in ten of the views have a part of another image in them (matching functions on views, mixed ones too: Beyer et
al., arXiv 2106.05237; CutMix: Yun et al., 1905.04899). Sharpening says less of which clusters lie near and more of
which one it is: what counts in a cascade is to be sure of many images, not to tell how unsure the others are
(distillation: Hinton et al., arXiv 1503.02531).

How far views are shifted adapts to the encoder: from one in 32 pixels it grows, up to one in 8, while agreement on
taught images is more than .04 above that on validation images, and shrinks otherwise (after adaptive augmentation:
Karras et al., arXiv 2006.06676).

The learning rate follows one cycle over the budget (`one_cycle`). After every epoch the saving of the averaged weights
is measured on validation images; once it no longer grows, the rate falls to 0 within the next quarter of the time so
far.
"""

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ssl_exit.data.images import ImageSource
from ssl_exit.encoders.front import FrontDescriptor
from ssl_exit.errors import InputError
from ssl_exit.exits.front import FrontRule
from ssl_exit.exits.heads import one_cycle
from ssl_exit.settings import Front, Optimization
from ssl_exit.training.module import Training, frozen_copy
from ssl_exit.training.run import checkpoints_in, seeded, train
from ssl_exit.training.views import shifted, with_cuts

DECAY = 1e-4  # of weights
BATCH, LEAST_BATCH, STEPS = 256, 32, 20  # images a step: fewer where an epoch would have less than 20 steps
WARM = 0.2  # of the budget, in which the learning rate rises
FALL = 0.25  # of the time so far, in which it falls to 0 once nothing is gained
LEAST_SHIFT, MOST_SHIFT = 32, 8  # a view is shifted by up to one in so many pixels to every side
CUT = 0.3  # share of views with a part of another image, where the encoder answers views
GAP = 0.04  # agreement on taught images above that on validation images, beyond which shifts grow
VALIDATION, MOST_VALIDATION = 0.03, 2000  # images that are not taught: a share, and at most so many
AVERAGED = 0.99  # decay of averaged weights


@dataclass(frozen=True)
class Taught:
    """A front, its head, and how teaching went.

    Attributes:
        front: in eval mode, on the CPU.
        rule: its head.
        seconds: of teaching.
        epochs: passes over the images.
        agreement: of its label with the full encoder's on validation images.
        saving: share of the validation images that it could answer at the disagreement asked for.
    """

    front: FrontDescriptor
    rule: FrontRule
    seconds: float
    epochs: int
    agreement: float
    saving: float


@dataclass
class _Clock:
    """How far teaching is; part of every checkpoint.

    Attributes:
        steps, seconds: so far.
        best: largest saving on validation images.
        stale: epochs since.
        shift: pixels by which views are shifted at most.
        fall_from: progress at which teaching was found to gain nothing any more.
    """

    steps: int = 0
    seconds: float = 0.0
    best: float = -1.0
    stale: int = 0
    shift: int = 0
    fall_from: float = math.inf


class FrontTraining(Training):
    """Teaches one front (see above).

    Args:
        front: trained in place.
        before: fronts that stand before it; its head sees their features too.
        targets: sharpened soft assignments, (N, K).
        labels: of the full encoder, (N,) int64.
        validation: positions of validation images, (v,).
        max_disagreement: at which the saving is measured.
        how: epochs, seconds, patience, mirror and learning rate.
        answers: images to the full encoder's soft assignment, (N, K), which are taught instead of `targets`; or None.
    """

    n_views = 1

    def __init__(
        self,
        front: FrontDescriptor,
        before: Sequence[FrontDescriptor],
        targets: Tensor,
        labels: Tensor,
        validation: np.ndarray,
        max_disagreement: float,
        how: Front,
        answers: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__(nn.Identity(), Optimization("sgd", how.learning_rate, 0.9, DECAY, "one_cycle"))
        self.front, self.before = front, nn.ModuleList(frozen_copy(one) for one in before)
        self.head = nn.Linear(sum(one.dim for one in before) + front.dim, targets.shape[1])
        own = nn.ModuleList([self.front, self.head])
        self.averaged = AveragedModel(own, multi_avg_fn=get_ema_multi_avg_fn(AVERAGED), use_buffers=True)
        self.averaged.requires_grad_(False)
        self.targets, self.labels, self.validation = targets, labels, validation
        self.max_disagreement, self.how, self.answers = max_disagreement, how, answers
        taught = ("epochs", "seconds", "patience", "sharpness", "mirror", "match", "learning_rate")
        self.options = {name: getattr(how, name) for name in taught}
        self.options |= {"max_disagreement": max_disagreement}
        side = -(-max(front.image_shape[1:]) // front.factor)
        self.shifts = side // LEAST_SHIFT, side // MOST_SHIFT
        self.clock = _Clock(shift=self.shifts[0])
        self.began = time.perf_counter()

    def attach(self, source: ImageSource, positions: np.ndarray, seed: int) -> None:
        self.source = source
        self.taught = positions[:: max(1, len(positions) // len(self.validation))][: len(self.validation)]

    def configure_optimizers(self) -> Any:
        parameters, how = [*self.front.parameters(), *self.head.parameters()], self.optimization
        return torch.optim.SGD(
            parameters, how.learning_rate, how.momentum, nesterov=True, weight_decay=how.weight_decay
        )

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> tuple[Tensor, list[Tensor]]:
        targets, images = batch
        mirror = torch.rand(len(images)) < 0.5 if self.how.mirror else None
        views = shifted(images, self.clock.shift, mirror)
        return targets.float(), [self.prepared(views if self.answers is None else with_cuts(views, CUT))]

    def losses(self, target: Tensor, views: Sequence[Tensor]) -> dict[str, Tensor]:
        if self.answers is not None:
            with torch.no_grad():
                target = sharpened(self.answers(views[0]), self.how.sharpness)
        logits = self._logits(self.front, self.head, views[0])
        with torch.autocast(self.device.type, enabled=False):
            return {"loss": F.cross_entropy(logits.float(), target)}

    def _logits(self, front: nn.Module, head: nn.Module, images: Tensor) -> Tensor:
        with torch.no_grad():
            seen = [one.eval()(images) for one in self.before]
        return head(torch.cat([*seen, front(images)], dim=1))

    @property
    def progress(self) -> float:
        """Share of the budget that is spent, in [0, 1]."""
        spent = self.clock.steps / max(1, float(self.trainer.estimated_stepping_batches))
        return spent if self.how.seconds is None else max(spent, self.clock.seconds / self.how.seconds)

    @property
    def rate(self) -> float:
        """Learning rate / its peak, in [0, 1]; 0 ends teaching."""
        now, fall_from = self.progress, self.clock.fall_from
        if now < fall_from:
            return one_cycle(now, WARM) if now < 1 else 0.0
        rest = min(FALL * fall_from, 1 - fall_from)
        return one_cycle(fall_from, WARM) * max(0.0, 1 - (now - fall_from) / rest)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["clock"] = asdict(self.clock)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.clock = _Clock(**checkpoint["clock"])

    def on_train_start(self) -> None:
        self.began = time.perf_counter()

    def on_train_epoch_start(self) -> None:
        if self.rate == 0:  # resumed at its end
            self.trainer.should_stop = True

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = self.how.learning_rate * self.rate * len(batch[1][0]) * self.trainer.world_size / BATCH

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.averaged.update_parameters(nn.ModuleList([self.front, self.head]))
        now = time.perf_counter()
        seconds, self.began = now - self.began, now
        self.clock.steps += 1
        self.clock.seconds += self._shared(seconds)  # or one process would stop before another
        images = len(batch[1][0]) * self.trainer.world_size
        self.log("images_per_second", images / seconds, prog_bar=True, batch_size=1)
        if self.rate == 0:
            self.trainer.should_stop = True

    def on_train_epoch_end(self) -> None:
        front, head = self.averaged.module.children()
        both = (self.measured(front, head, some) for some in (self.validation, self.taught))
        (agreement, saving), (of_taught, _) = self._shared(list(both) if self.trainer.is_global_zero else None)
        gap = of_taught - agreement
        least, most = self.shifts
        step = max(1, least) if gap > GAP else -max(1, least)
        self.clock.shift = min(most, max(least, self.clock.shift + step))
        self.log("agreement", agreement, prog_bar=True)
        self.log("saving", saving, prog_bar=True)
        if self.how.patience == 0 or not WARM <= self.progress < self.clock.fall_from:
            return
        self.clock.stale = 0 if saving > self.clock.best else self.clock.stale + 1
        self.clock.best = max(saving, self.clock.best)
        if self.clock.stale >= self.how.patience:
            self.clock.fall_from = self.progress

    def on_train_end(self) -> None:
        for buffer in self.front.buffers():  # batch statistics are each process's own
            buffer.copy_(self._shared(buffer))

    def _shared(self, value: Any) -> Any:
        """The first process's value."""
        return self.trainer.strategy.broadcast(value)

    @torch.no_grad()
    def measured(self, front: nn.Module, head: nn.Module, positions: np.ndarray) -> tuple[float, float]:
        """Agreement, and the share that could leave at the disagreement asked for, of some images."""
        was = front.training
        front.eval()
        scores, agrees = [], []
        for batch in self.source.batches(positions, 512):
            if len(batch.indices):
                z = self._logits(front, head, self.prepared(batch.images.to(self.device))).float()
                score, label = z.softmax(1).max(1)
                scores.append(score.cpu())
                agrees.append(label.cpu() == self.labels[batch.indices])
        front.train(was)
        return leaving_share(torch.cat(scores), torch.cat(agrees), self.max_disagreement)


def leaving_share(scores: Tensor, agrees: Tensor, max_disagreement: float) -> tuple[float, float]:
    """Agreement of all, and the largest share that one threshold lets leave while at most so many of all disagree.

    Args:
        scores: (n,).
        agrees: whether each label equals the full encoder's, (n,) bool.
        max_disagreement: share of the n images.
    """
    order = scores.argsort(descending=True)
    wrong = (~agrees[order]).cumsum(0)
    ranked = scores[order]
    last_of_equals = torch.cat([ranked[1:] < ranked[:-1], torch.ones(1, dtype=torch.bool)])
    fits = (last_of_equals & (wrong <= max_disagreement * len(scores))).nonzero()[:, 0]
    share = (int(fits[-1]) + 1) / len(scores) if len(fits) else 0.0
    return float(agrees.float().mean()), share


def sharpened(soft: Tensor, power: float) -> Tensor:
    """q^s / sum_k q_k^s, rows of sum 1: (..., K) -> the same."""
    return torch.softmax(power * soft.clamp(min=1e-30).log(), dim=-1)


def teach(
    front: FrontDescriptor,
    before: Sequence[FrontDescriptor],
    source: ImageSource,
    positions: np.ndarray,
    targets: Tensor,
    labels: Tensor,
    how: Front,
    *,
    max_disagreement: float,
    seed: int = 0,
    device: str = "auto",
    about: dict[str, Any] | None = None,
    folder: Path | None = None,
    answers: Callable[[Tensor], Tensor] | None = None,
    progress: bool = False,
) -> Taught:
    """Teach a front the final clusters.

    Args:
        front: left unchanged.
        before: taught fronts that stand before it; its head sees their features too.
        source: images as the encoder takes them; they may be averaged down to what the front sees.
        positions: of the images to teach, (n,).
        targets: sharpened soft assignments, (N, K).
        labels: of the full encoder, (N,) int64.
        how: epochs, seconds, patience, mirror, learning rate.
        max_disagreement: at which the saving is measured.
        seed: of weights, order and views.
        device: auto, cpu or cuda; anything else is taught on the CPU.
        about: what is taught, as JSON has it; a checkpoint is continued only where it is the same.
        folder: for checkpoints; teaching goes on from the last one there.
        answers: images to the full encoder's soft assignment, (N, K); taught instead of `targets` where given.
        progress: show a bar on a terminal: images per second, agreement and saving of validation images.

    Raises:
        InputError: fewer than 34 images, checkpoints of other settings, or a loss that is not finite.
    """
    order = np.random.default_rng(seed).permutation(positions)
    validation, taught = np.split(order, [min(math.ceil(VALIDATION * len(order)), MOST_VALIDATION)])
    if len(taught) < LEAST_BATCH:
        raise InputError(f"a front cannot be taught by {len(order)} images; it needs more than {LEAST_BATCH}")
    with seeded(seed):
        training = FrontTraining(
            copy.deepcopy(front), before, targets, labels, validation, max_disagreement, how, answers
        )
    batch = max(LEAST_BATCH, min(BATCH, len(taught) // STEPS)) // how.devices * how.devices
    begun = time.perf_counter()
    train(
        training,
        source,
        positions=taught,
        out=folder,
        resume=bool(folder and checkpoints_in(folder)),
        settings=about,
        progress=progress,
        epochs=how.epochs,
        batch_size=batch,
        monitor_share=0.0,
        device=device if device in ("auto", "cpu", "cuda") else "cpu",
        devices=how.devices,
        seed=seed,
        logger="none" if folder is None else "csv",
    )
    agreement, saving = training.measured(training.front, training.head, validation)
    rule = FrontRule(training.head.in_features, training.head.out_features)
    rule.weight.copy_(training.head.weight.detach())
    rule.bias.copy_(training.head.bias.detach())
    seconds = max(training.clock.seconds, time.perf_counter() - begun)  # with those before an interruption
    training.front.requires_grad_(False)
    epochs = round(training.clock.steps / max(1, len(taught) // batch))
    return Taught(training.front.eval(), rule, seconds, epochs, agreement, saving)
