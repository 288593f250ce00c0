"""Images on their way to the device, ahead of the encoder."""

from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch

from ssl_exit.data.images import Batch


def on_device(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """The same batches with their images on the device, indices where they were.

    For a CUDA device each batch is copied from pinned memory on a stream of its own while the one before it is at
    work; elsewhere batches pass through.
    """
    if device.type != "cuda":
        yield from batches
        return
    stream = torch.cuda.Stream(device)
    waiting: tuple[Batch, torch.cuda.Event] | None = None
    for batch in batches:
        with torch.cuda.stream(stream):
            images = batch.images if batch.images.is_cuda else batch.images.pin_memory()
            copied = replace(batch, images=images.to(device, non_blocking=True))
            arrived = stream.record_event()  # of this copy alone: the next one is under way when it is waited for
        if waiting is not None:
            yield _ready(*waiting)
        waiting = copied, arrived
    if waiting is not None:
        yield _ready(*waiting)


def _ready(batch: Batch, arrived: torch.cuda.Event) -> Batch:
    current = torch.cuda.current_stream(batch.images.device)
    current.wait_event(arrived)
    batch.images.record_stream(current)
    return batch
