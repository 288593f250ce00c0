"""Images in memory between passes over them."""

from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F

from ssl_exit.data.images import Batch, ImageSource, TensorImages
from ssl_exit.data.memory import MEMORY_SHARE, memory

HALF = 65504.0  # the largest number in half precision


class CachedImages:
    """Images in memory and in half precision, averaged down by a whole factor, where that takes less than a quarter of
    the machine's memory.

    Args:
        source: of the images.
        image_shape: (C, H, W).
        side: pixels a side at most.
    """

    def __init__(self, source: ImageSource, image_shape: Sequence[int], side: int) -> None:
        self.source, channels = source, image_shape[0]
        self.factor = -(-max(image_shape[1:]) // side)
        height, width = (-(-pixels // self.factor) for pixels in image_shape[1:])
        fits = 2 * len(source) * channels * height * width <= MEMORY_SHARE * memory()
        there = isinstance(source, TensorImages) and self.factor == 1  # in memory already
        shape = (len(source), channels, height, width)
        self.images = torch.empty(shape, dtype=torch.float16) if fits and not there else None

    def add(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The same batches; their images are kept."""
        for batch in batches:
            if self.images is not None and len(batch.indices):
                x = batch.images.cpu()
                reduced = F.avg_pool2d(x, self.factor, ceil_mode=True) if self.factor > 1 else x
                self.images[batch.indices] = reduced.clamp(-HALF, HALF).half()
            yield batch

    def open(self) -> ImageSource:
        """The images added, by position; or the source itself, which decodes them in every pass."""
        return self.source if self.images is None else TensorImages(self.images)
