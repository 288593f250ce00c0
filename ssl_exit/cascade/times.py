"""Measured time of stages and exits at several batch sizes."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ssl_exit.encoders.tapped import TappedEncoder
from ssl_exit.exits.final import Final
from ssl_exit.exits.rules import ExitRule

SIZES = (1, 8, 64)  # batch sizes that are timed, beside the one in use


def now(device: torch.device) -> float:
    """Seconds on a clock, once the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type != "cpu":
        torch.accelerator.synchronize(device)  # came with torch 2.6
    return time.perf_counter()


@dataclass(frozen=True, eq=False)
class StageTimes:
    """Seconds of one run at several batch sizes.

    Attributes:
        sizes: batch sizes, rising, (S,).
        stages: of every stage, (S, E + 1).
        exits: of every exit's own work and, last, of the final assignment, (S, E + 1).
        moves: of moving all images at every exit point to another place, (S, E).
    """

    sizes: np.ndarray
    stages: np.ndarray
    exits: np.ndarray
    moves: np.ndarray

    def __post_init__(self) -> None:
        s, ends = self.stages.shape
        shapes = self.sizes.shape, self.exits.shape, self.moves.shape
        if s < 1 or shapes != ((s,), (s, ends), (s, ends - 1)) or (np.diff(self.sizes, prepend=0) <= 0).any():
            raise ValueError(f"times of stages {self.stages.shape}, sizes, exits and moves {shapes} do not fit")

    @property
    def stage_seconds(self) -> np.ndarray:
        """Seconds an image of every stage at the largest size, (E + 1,)."""
        return self.stages[-1] / self.sizes[-1]

    @property
    def exit_seconds(self) -> np.ndarray:
        """Seconds an image of every exit's own work and, last, of the final assignment, (E + 1,)."""
        return self.exits[-1] / self.sizes[-1]

    @property
    def move_seconds(self) -> np.ndarray:
        """Seconds an image of moving it at every exit point, (E,)."""
        return self.moves[-1] / self.sizes[-1]

    def compacting_pays(self, stages: range, before: int, after: int) -> bool:
        """Whether to move survivors together before these stages: `after` of `before` images go on."""
        begin = stages.start
        run = self.stages[:, begin : stages.stop].sum(1)
        return self._of(self.moves[:, begin - 1], after) < self._of(run, before) - self._of(run, after)

    def _of(self, seconds: np.ndarray, n: int) -> float:
        """Seconds for n images: between the sizes by interpolation, beyond them in proportion."""
        most = self.sizes[-1]
        return float(np.interp(n, self.sizes, seconds) * max(1.0, n / most))

    def without(self, kept: Sequence[int]) -> "StageTimes":
        """The same where only the exits `kept` are in place."""
        ends = [*kept, self.stages.shape[1] - 1]
        total = np.cumsum(self.stages, axis=1)[:, ends]
        stages = np.diff(total, axis=1, prepend=0)
        return StageTimes(self.sizes, stages, self.exits[:, ends], self.moves[:, list(kept)])


@torch.inference_mode()
def stage_times(
    tapped: TappedEncoder, rules: Sequence[ExitRule], final: Final, images: Tensor, repeats: int = 3
) -> StageTimes:
    """Time every stage and every exit's own work.

    The chain of stages is run several times at every size and medians are taken stage by stage.

    Args:
        tapped, rules, final: of a cascade.
        images: one batch, (N, C, H, W), of the size in use.
        repeats: runs after one to warm up.
    """
    device = tapped.device
    last = len(tapped.descriptors)
    sizes = [*(size for size in SIZES if size < len(images)), len(images)]
    seconds = np.zeros((len(sizes), repeats + 1, 3, last + 1))
    for s, size in enumerate(sizes):
        for r in range(repeats + 1):
            x = tapped.enter(images[:size])
            described = torch.empty(size, 0, device=device)
            for i, stage in enumerate(tapped.staged.stages):
                times = [now(device)]
                x = stage(x)
                times.append(now(device))
                if i < last:
                    own = tapped.descriptors[i](x)
                    described = torch.cat([described, own], dim=1) if tapped.accumulate else own
                    rules[i](described)
                else:
                    final(tapped.output(x))
                times.append(now(device))
                x.clone()
                seconds[s, r, :, i] = np.diff([*times, now(device)])
    stages, exits, moves = np.median(seconds[:, 1:], axis=1).transpose(1, 0, 2)
    return StageTimes(np.array(sizes), stages, exits, moves[:, :-1])
