"""Measured time of stages and exits."""

import time

import numpy as np
import torch
from torch import Tensor

from ssl_exit.cascade import Cascade


def now(device: torch.device) -> float:
    """Seconds on a clock, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@torch.inference_mode()
def stage_seconds(cascade: Cascade, images: Tensor, repeats: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Seconds an image of each stage and of each exit's own work.

    The whole chain is run several times and medians are taken stage by stage.

    Args:
        cascade: with fitted rules.
        images: one batch, (N, C, H, W).
        repeats: runs after one to warm up.

    Returns:
        Stages, (E + 1,), and exits, (E + 1,), of which the last is the final assignment.
    """
    device = cascade.thresholds.device
    tapped = cascade.tapped
    last = len(tapped.descriptors)
    taken = np.zeros((repeats + 1, 2, last + 1))
    for r in range(repeats + 1):
        x = images.to(device)
        described = x.new_empty(len(x), 0)
        for i, stage in enumerate(tapped.staged.stages):
            start = now(device)
            x = stage(x)
            middle = now(device)
            if i < last:
                own = tapped.descriptors[i](x)
                described = torch.cat([described, own], dim=1) if tapped.accumulate else own
                cascade.rules[i](described)
            else:
                cascade.final(tapped.output(x))
            taken[r, :, i] = middle - start, now(device) - middle
    stages, exits = np.median(taken[1:], axis=0) / len(images)
    return stages, exits
