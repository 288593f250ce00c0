"""A front: a small network before the encoder, whose features are the descriptor at the input.

It sees the images, averaged down where they are large. Taught the final clusters (`ssl_exit.training.front`), it is the
first exit of the cascade; nothing of the encoder has run when it answers.
"""

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from itertools import takewhile
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_exit.encoders.counting import counted
from ssl_exit.encoders.graph import eval_mode
from ssl_exit.encoders.inference import PRECISIONS, for_inference
from ssl_exit.errors import InputError

LEAST_WIDTH, WIDEST_FRONT = 8, 256  # channels of the first convolution


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, by a 1x1 convolution where the shape changes (He et al., 1512.03385)."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, 1, 1, bias=False),
            nn.BatchNorm2d(channels),
        )
        same = in_channels == channels and stride == 1
        shortcut = (nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels))
        self.shortcut = nn.Identity() if same else nn.Sequential(*shortcut)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


class FrontNetwork(nn.Module):
    """A 3x3 convolution with stride 2 to w channels, then residual blocks with w, 2w and 4w channels, the last two at
    half and a quarter of the resolution, and an average over positions: (N, C, H, W) -> (N, 4w).

    Args:
        channels: of images.
        width: w.
        depth: blocks at every resolution.
    """

    def __init__(self, channels: int, width: int, depth: int = 1) -> None:
        super().__init__()
        self.config = {"channels": channels, "width": width, "depth": depth}
        stem = nn.Conv2d(channels, width, 3, 2, 1, bias=False)
        self.stem = nn.Sequential(stem, nn.BatchNorm2d(width), nn.ReLU())
        before, blocks = width, []
        for level in range(3):
            for i in range(depth):
                blocks.append(ResidualBlock(before, width << level, 2 if level and i == 0 else 1))
                before = width << level
        self.blocks = nn.Sequential(*blocks)

    @staticmethod
    def config_of(weights: Mapping[str, Tensor]) -> dict[str, int]:
        """The arguments of the network that has these weights."""
        width, channels = weights["stem.0.weight"].shape[:2]
        blocks = {key.split(".")[1] for key in weights if key.startswith("blocks.")}
        return {"channels": channels, "width": width, "depth": len(blocks) // 3}

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.stem(x)).mean((2, 3))


class FrontDescriptor(nn.Module):
    """A network on images, averaged down to at most `side` pixels; a descriptor at the input.

    Attributes:
        network: images to features, (N, C, H, W) -> (N, dim).
        side: pixels a side that it sees at most.
        dim: number of features.
        macs: multiply-adds per image.
        image_shape: of an image before it is averaged down, (C, H, W).
    """

    kind = "front"
    normalize = False

    def __init__(self, network: nn.Module, image_shape: Sequence[int], side: int) -> None:
        super().__init__()
        self.network, self.side, self.image_shape = network, side, tuple(image_shape)
        self.dim, self.macs = self._measured()

    def _measured(self) -> tuple[int, int]:
        try:
            with eval_mode(self):
                features, macs = counted(self, torch.zeros(2, *self.image_shape))
        except (RuntimeError, ValueError, TypeError, AttributeError) as error:
            raise InputError(
                f"the front cannot take images of shape {self.image_shape}, averaged down to at most {self.side} "
                f"pixels a side, to one tensor of features: {error}"
            ) from error
        if features.dim() != 2 or len(features) != 2:
            raise InputError(
                f"a front must return one vector of features an image, (N, D); it returned {tuple(features.shape)} "
                "for two images"
            )
        return features.shape[1], macs

    def reduced(self, images: Tensor) -> Tensor:
        """Images averaged down by a whole factor: (N, C, H, W) -> (N, C, h, w) with h, w <= side."""
        factor = -(-max(images.shape[2:]) // self.side)  # of images that may be averaged down already
        return F.avg_pool2d(images, factor, ceil_mode=True) if factor > 1 else images

    @property
    def factor(self) -> int:
        """By which images are averaged down."""
        return -(-max(self.image_shape[1:]) // self.side)

    def forward(self, images: Tensor) -> Tensor:
        """Features, (N, dim) float32, in memory of their own; the images stay as they are."""
        seen, own = self.reduced(images), isinstance(self.network, FrontNetwork)
        if seen is images and not own:  # another network may work in place
            seen = images.clone()
        return self.network(seen).to(torch.float32, copy=not own)

    def for_inference(self, precision: str) -> "FrontDescriptor":
        """A copy rewritten for speed where it then computes the same; this one is left unchanged."""
        noise = torch.randn(2, *self.image_shape, generator=torch.Generator().manual_seed(0))

        def rewritten(dtype: torch.dtype, rewrite: bool) -> FrontDescriptor:
            result = copy.copy(self)
            result._modules = {"network": for_inference(self.network, dtype, rewrite=rewrite)}
            return result.eval()

        with torch.inference_mode():
            expected = rewritten(torch.float32, False)(noise)
            try:
                same = torch.allclose(rewritten(torch.float32, True)(noise), expected, rtol=1e-3, atol=1e-4)
            except RuntimeError:
                same = False
        return rewritten(PRECISIONS[precision], same)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], network: nn.Module | None = None) -> "FrontDescriptor":
        """What `config` described; a network that is not this library's must be passed.

        Raises:
            InputError: it is missing.
        """
        if config["network"] is None and network is None:
            raise InputError("this model has a front of your own: load(folder, front=that module)")
        if config["network"] is not None and network is not None:
            raise InputError("this model has no front of your own; leave front out")
        with torch.random.fork_rng(devices=[]):  # weights drawn here are replaced
            built = FrontNetwork(**config["network"]) if network is None else copy.deepcopy(network).cpu()
        return cls(built, config["image_shape"], config["side"])

    @property
    def config(self) -> dict[str, Any]:
        """How to build it again, for JSON; its network is None where that is not this library's."""
        own = self.network.config if isinstance(self.network, FrontNetwork) else None
        return {"network": own, "image_shape": list(self.image_shape), "side": self.side}


def widest_front(
    image_shape: Sequence[int],
    side: int,
    depth: int,
    macs: float,
    width: int | None,
    affordable: Callable[[FrontDescriptor], bool],
) -> FrontDescriptor:
    """The widest front within so many multiply-adds and within what else is affordable; at least 8 channels wide.

    Args:
        image_shape: (C, H, W).
        side: pixels a side that it sees at most.
        depth: blocks at every resolution.
        macs: multiply-adds per image at most.
        width: channels of the first convolution, whatever they cost; None: as many as are affordable.
        affordable: tells whether a front is not too slow; asked from the widest down.
    """

    def front(width: int) -> FrontDescriptor:
        return FrontDescriptor(FrontNetwork(image_shape[0], width, depth), image_shape, side)

    if width is not None:
        return front(width)
    widths = list(takewhile(lambda w: front(w).macs <= macs, range(LEAST_WIDTH, WIDEST_FRONT + 1, 4))) or [LEAST_WIDTH]
    while not affordable(chosen := front(widths[-1])) and len(widths) > 1:
        widths = widths[: max(1, int(len(widths) * 0.8))]
    if chosen.macs > macs or not affordable(chosen):
        warnings.warn(
            f"the narrowest front, {LEAST_WIDTH} channels, takes more multiply-adds or time than asked for: raise macs "
            "or time, or do without on so small an encoder",
            stacklevel=2,
        )
    return chosen
