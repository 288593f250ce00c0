"""What trained heads share: their form, and the loop that trains those of all exits on frozen descriptors."""

import math
import time
from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_exit.errors import InputError
from ssl_exit.exits.centroid import CentroidRule
from ssl_exit.exits.rules import ExitRule, FitData, likeliest_temperature

BATCH = 256
LEAST_STEPS = 1000
STARTS = ("random", "centroid")


class Head(ExitRule):
    """Base of trained heads: logits = W x + b, plus V relu(U x + c) where there is a hidden layer.

    The encoder is frozen and heads of different exits share no weights; all are trained in one loop, each on the
    descriptor of its exit. Without labels the targets are the final clusters. A subclass may change `loss`,
    `score` and `width`.

    Options:
        hidden: units of the hidden layer; 0 for none.
        epochs: passes over the sample; more if that makes fewer than 1,000 steps, unless it is 0.
        seconds: train all exits together for so long instead (and once more where exits="auto" leaves some out).
        start: "random", or "centroid": W and b start as the centroid rule in closed form, V as 0.
        learning_rate: peak of a one-cycle schedule (AdamW).
    """

    needs_soft = True
    sample_images = 50_000
    weight: Tensor
    bias: Tensor
    top: Tensor

    def __init__(
        self,
        dim: int,
        n_clusters: int,
        *,
        hidden: int = 0,
        epochs: int = 15,
        seconds: float | None = None,
        start: str = "random",
        learning_rate: float = 2e-3,
    ) -> None:
        super().__init__(dim, n_clusters)
        if start not in STARTS:
            raise InputError(f"start must be one of {STARTS}; got {start!r}")
        counts = isinstance(hidden, int) and isinstance(epochs, int) and hidden >= 0 and epochs >= 0
        real = all(isinstance(v, (int, float)) and v > 0 for v in (learning_rate, 1 if seconds is None else seconds))
        if not (counts and real):
            raise InputError(
                "a head needs whole numbers hidden >= 0 and epochs >= 0, and seconds > 0 and learning_rate > 0; got "
                f"hidden={hidden!r}, epochs={epochs!r}, seconds={seconds!r}, learning_rate={learning_rate!r}"
            )
        self.hidden, self.start = hidden, start
        self.epochs, self.seconds, self.learning_rate = epochs, seconds, learning_rate
        self.needs_scatter = start == "centroid"
        self.register_buffer("weight", torch.zeros(self.width + hidden, dim))  # W above U: one matrix product
        self.register_buffer("bias", torch.zeros(self.width + hidden))
        self.register_buffer("top", torch.zeros(self.width, hidden))

    def logits(self, x: Tensor) -> Tensor:
        z = torch.addmm(self.bias, x, self.weight.T)
        return z[:, : self.width] + z[:, self.width :].relu() @ self.top.T if self.hidden else z

    @property
    def macs(self) -> int:
        return self.weight.numel() + self.top.numel()

    def fit(self, data: FitData) -> None:
        self.fit_all([self], [data], np.array([0.5, 1.0]))

    @classmethod
    def fit_all(cls, rules: Sequence[ExitRule], data: Sequence[FitData], costs: np.ndarray) -> None:
        heads = [rule for rule in rules if isinstance(rule, Head)]
        trainees = nn.ModuleList()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(data[0].seed)
            for head, one in zip(heads, data, strict=True):
                trainees.append(_Trainee(head, one))
            heads[0]._train(trainees, data, torch.from_numpy(costs).float())
        for head, trainee in zip(heads, trainees, strict=True):
            trainee.hand_over(head)  # type: ignore[operator]

    def loss(self, outputs: Sequence[Tensor], labels: Tensor, soft: Tensor, costs: Tensor, progress: float) -> Tensor:
        """What training minimises; here the sum of every exit's cross-entropy.

        Args:
            outputs: logits of every exit, (B, width) each.
            labels: targets, (B,) int64.
            soft: the full encoder's soft assignment, (B, K).
            costs: cost of leaving at each exit and, last, of the full encoder, (E + 1,).
            progress: of training, in [0, 1).
        """
        return torch.stack([F.cross_entropy(z, labels) for z in outputs]).sum()

    def _train(self, trainees: nn.ModuleList, data: Sequence[FitData], costs: Tensor) -> None:
        optimizer = torch.optim.AdamW(trainees.parameters(), lr=self.learning_rate, weight_decay=0.01, fused=True)
        labels, soft = data[0].labels, data[0].soft
        widest = max((one.sample for one in data), key=lambda sample: sample.shape[1])
        nested = all(one.sample.data_ptr() == widest.data_ptr() for one in data)
        trainees.train()
        for progress, rows in self._batches(len(labels)):
            for group in optimizer.param_groups:
                group["lr"] = self.learning_rate * one_cycle(progress)
            if nested:  # accumulated descriptors: one gather serves all exits
                wide = widest[rows]
                seen = [wide[:, : one.sample.shape[1]] for one in data]
            else:
                seen = [one.sample[rows] for one in data]
            outputs = [trainee(x) for trainee, x in zip(trainees, seen, strict=True)]
            loss = self.loss(outputs, labels[rows], soft[rows], costs, progress)
            optimizer.zero_grad(set_to_none=False)
            loss.backward()
            optimizer.step()
        trainees.eval()

    def _batches(self, n: int) -> Iterator[tuple[float, Tensor]]:
        """How far training is, in [0, 1), and the rows of the next batch; at least two rows."""
        size = min(BATCH, n)
        steps, began, step = self.epochs * (n // size), time.perf_counter(), 0
        steps = max(steps, LEAST_STEPS) if steps else 0
        while size > 1:
            for rows in torch.randperm(n)[: n // size * size].split(size):
                progress = step / steps if self.seconds is None and steps else 1.0
                if self.seconds is not None:
                    progress = (time.perf_counter() - began) / self.seconds
                if progress >= 1:
                    return
                yield progress, rows
                step += 1


class _Trainee(nn.Module):
    """One head while it is trained: inputs standardised, the hidden layer batch-normalised."""

    mean: Tensor
    scale: Tensor

    def __init__(self, head: Head, data: FitData) -> None:
        super().__init__()
        deviation, mean = torch.std_mean(data.sample, dim=0, correction=0)
        flat = deviation <= 1e-6 * deviation.max().clamp(min=1e-30)  # an entry that never varies says nothing
        self.register_buffer("mean", mean)
        self.register_buffer("scale", torch.where(flat, 0.0, 1 / deviation))
        self.linear = nn.Linear(head.dim, head.width)
        self.hidden: nn.Module | None = None
        if head.hidden:
            self.first = nn.Linear(head.dim, head.hidden, bias=False)
            self.norm = nn.BatchNorm1d(head.hidden)
            self.last = nn.Linear(head.hidden, head.width, bias=False)
            self.hidden = nn.Sequential(self.first, self.norm, nn.ReLU(), self.last)
        if head.start == "centroid":
            self._start_as_centroids(head, data)

    def forward(self, x: Tensor) -> Tensor:
        x = (x - self.mean) * self.scale
        return self.linear(x) if self.hidden is None else self.linear(x) + self.hidden(x)

    def _start_as_centroids(self, head: Head, data: FitData) -> None:
        rule = CentroidRule(head.dim, head.n_clusters)
        rule.fit(data)
        k = head.n_clusters
        with torch.no_grad():
            temperature = likeliest_temperature(rule.logits(data.sample), data.labels)
            self.linear.weight.zero_()
            self.linear.bias.zero_()
            self.linear.weight[:k] = torch.where(self.scale > 0, rule.weight / self.scale, 0.0) / temperature
            self.linear.bias[:k] = (rule.bias + rule.weight @ self.mean) / temperature
            if self.hidden is not None:
                self.last.weight.zero_()

    @torch.no_grad()
    def hand_over(self, head: Head) -> None:
        """Write what was learnt into the head, standardisation and normalisation folded into its weights."""
        weight: list[Tensor] = [self.linear.weight]
        bias: list[Tensor] = [self.linear.bias]
        if self.hidden is not None:
            assert self.norm.running_var is not None
            assert self.norm.running_mean is not None
            gain = self.norm.weight / (self.norm.running_var + self.norm.eps).sqrt()
            weight.append(gain[:, None] * self.first.weight)
            bias.append(self.norm.bias - gain * self.norm.running_mean)
            head.top.copy_(self.last.weight)
        head.weight.copy_(torch.cat(weight) * self.scale)
        head.bias.copy_(torch.cat(bias) - head.weight @ self.mean)


def one_cycle(progress: float, warmup: float = 0.3) -> float:
    """Learning rate / its peak: cosine from 1/25 up to 1, then down to 0 (Smith & Topin, arXiv 1708.07120)."""
    if progress < warmup:
        return 0.04 + 0.96 * (1 - math.cos(math.pi * progress / warmup)) / 2
    return (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup))) / 2
