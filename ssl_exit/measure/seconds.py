"""Measured time of segments as they run."""

import numpy as np
import torch
from torch import Tensor

from ssl_exit.cascade.plan import Plan
from ssl_exit.cascade.times import now


@torch.inference_mode()
def segment_seconds(
    plan: Plan, full: Plan, images: Tensor, batch_size: int, repeats: int = 5
) -> tuple[np.ndarray, float]:
    """Seconds of one run of every segment and, in turns with them, of the full encoder and its assignment.

    Args:
        plan: an exit's own work belongs to the segment before it.
        full: the plan of the full encoder.
        images: one batch, (N, C, H, W), on the device in use.
        batch_size: the one in use; batches of this size run compiled where the plan compiles.
        repeats: runs after one to warm up; medians are taken.

    Returns:
        Seconds a segment, (S,), and seconds of the full encoder.
    """
    device, full_batch = images.device, len(images) == batch_size
    seconds = np.zeros((repeats + 1, len(plan.segments) + 1))
    for r in range(repeats + 1):
        start = now(device)
        x, memory = plan.enter(images)
        for i, segment in enumerate(plan.segments):
            x, memory = plan.call(segment, x, memory, full_batch=full_batch)[:2]
            seconds[r, i] = now(device) - start
            if full_batch and plan.compiled:  # CUDA graphs write their next results over these
                x, memory = x.clone(), memory.clone()
                torch.compiler.cudagraph_mark_step_begin()
            start = now(device)
        full.call(full.segments[0], *full.enter(images), full_batch=full_batch)
        seconds[r, -1] = now(device) - start
    *segments, encoder = np.median(seconds[1:], axis=0)
    return np.array(segments), float(encoder)
