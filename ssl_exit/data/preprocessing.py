"""From a decoded image to the tensor an encoder expects; saved with every model."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ssl_exit.errors import InputError, shown

LARGEST = 16_384  # pixels a side that an encoder may see
LONGEST = 4  # sides of an image: what is longer is cropped before it is scaled, so that memory stays bounded
GAP = 3  # an image is first averaged down by a whole factor to no less than so many times its final size
METADATA = "ssl_exit.preprocessing"  # key in the metadata of a weights file


@dataclass(frozen=True)
class Preprocessing:
    """Resize the shorter side, crop the centre, scale to [0, 1], subtract the mean, divide by the deviation.

    Attributes:
        size: height and width in pixels of what the encoder sees.
        mean: per channel, of pixels in [0, 1]; one entry makes grey images, three make RGB.
        std: per channel, of pixels in [0, 1].
        crop: share of the shorter side kept by the centre crop, in (0, 1].
    """

    size: int
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    crop: float = 1.0

    def __post_init__(self) -> None:
        size, crop = self.size, self.crop
        if not isinstance(size, Integral) or isinstance(size, bool) or not 1 <= size <= LARGEST or not 0 < crop <= 1:
            raise InputError(
                f"size must be a whole number from 1 to {LARGEST} and crop in (0, 1]; got size={shown(size)}, "
                f"crop={shown(crop)}"
            )
        fit = len(self.mean) == len(self.std) in (1, 3)
        if not fit or not np.isfinite([*self.mean, *self.std]).all() or min(self.std) <= 0:
            raise InputError(
                "mean and std need one finite entry a channel, 1 (grey) or 3 (RGB), every std above 0; got "
                f"mean={shown(self.mean)}, std={shown(self.std)}"
            )
        object.__setattr__(self, "mean", tuple(self.mean))
        object.__setattr__(self, "std", tuple(self.std))

    def __call__(self, image: Image.Image | Tensor) -> Tensor:
        """Preprocess one image or a batch of equal size.

        Args:
            image: a PIL image of any mode, or uint8 pixels, (..., C, H, W).

        Returns:
            float32, (..., C, size, size).

        Raises:
            InputError: see `pixels`.
        """
        return self.normalize(self.pixels(image).float().div_(255))

    def pixels(self, image: Image.Image | Tensor) -> Tensor:
        """The same without scaling and standardising: uint8, (..., C, size, size).

        Raises:
            InputError: pixels that are neither uint8 nor of a PIL mode with a known range, or have the wrong number
                of channels.
        """
        pixels = self._decode(image) if isinstance(image, Image.Image) else image
        if pixels.dtype != torch.uint8 or pixels.dim() < 3 or pixels.shape[-3] != len(self.mean):
            raise InputError(
                f"preprocessing takes uint8 images, (..., {len(self.mean)}, H, W); got {pixels.dtype}, "
                f"{tuple(pixels.shape)}"
            )
        from torchvision.transforms.v2 import functional as TF  # takes as long to import as torch

        short = round(self.size / self.crop)
        if min(pixels.shape[-2:]) != short:
            pixels = TF.resize(pixels, [short], antialias=True)
        if pixels.shape[-2:] != (self.size, self.size):
            pixels = TF.center_crop(pixels, [self.size, self.size])
        return pixels

    def normalize(self, images: Tensor) -> Tensor:
        """Subtract the mean and divide by the deviation: images in [0, 1], (..., C, H, W), changed in place."""
        mean, std = (torch.tensor(v, device=images.device).view(-1, 1, 1) for v in (self.mean, self.std))
        return images.sub_(mean).div_(std)

    def _decode(self, image: Image.Image) -> Tensor:
        """Pixels of a PIL image, cropped to at most four times as long as wide and averaged down towards its final
        size: what it takes is about 7 bytes a pixel of the file."""
        if image.mode == "F":
            raise InputError("floating-point pixels have no known range; save the images with 8 or 16 bits")
        least = GAP * round(self.size / self.crop)
        scale = least / min(image.size)
        if scale < 1:  # a JPEG is scaled while it is decoded
            image.draft(None, (math.ceil(image.width * scale), math.ceil(image.height * scale)))
        width, height = image.size
        longest = LONGEST * min(width, height)
        if max(width, height) > longest:
            left, top = max(0, width - longest) // 2, max(0, height - longest) // 2
            image = image.crop((left, top, left + min(width, longest), top + min(height, longest)))
        if image.mode.startswith("I"):
            image = Image.fromarray(_eight_bits(np.asarray(image)))
        image = image.convert("RGB" if len(self.mean) == 3 else "L")
        factor = min(image.size) // least
        from torchvision.transforms.v2.functional import pil_to_tensor

        return pil_to_tensor(image.reduce(factor) if factor > 1 else image)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Transform:
    """Any function from a PIL image in RGB to the tensor an encoder takes, such as a transform of timm or torchvision,
    or a processor of transformers inside a lambda.

    Attributes:
        name: of what it does; certificate and saved model know it by this alone, so change it with the function.
        function: PIL image to (C, H, W) float.
    """

    name: str
    function: Callable[[Image.Image], Tensor] = field(compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not callable(self.function):
            raise InputError(
                f"a Transform is a name and a function of a PIL image; got {self.name!r}, {self.function!r}"
            )

    def __call__(self, image: Image.Image | Tensor) -> Tensor:
        """One PIL image, or uint8 pixels, (C, H, W) or (N, C, H, W), each as a PIL image.

        Raises:
            InputError: the function returned anything but a floating-point tensor, (C, H, W).
        """
        if isinstance(image, Tensor):
            from torchvision.transforms.v2.functional import to_pil_image

            if image.dim() > 3:
                return torch.stack([self(one) for one in image])
            return self(to_pil_image(image))
        result = self.function(image.convert("RGB"))
        if not isinstance(result, Tensor) or result.dim() != 3 or not result.is_floating_point():
            got = f"{result.dtype}, {tuple(result.shape)}" if isinstance(result, Tensor) else type(result).__name__
            raise InputError(f"transform {self.name!r} must return a floating-point tensor, (C, H, W); got {got}")
        return result

    def pixels(self, image: Image.Image | Tensor) -> Tensor:
        """Raises InputError: what is not standardised is known of `Preprocessing` only."""
        raise InputError("training needs a Preprocessing; a Transform of your own says nothing of plain pixels")

    def to_dict(self) -> dict[str, Any]:
        return {"transform": self.name}


AnyPreprocessing = Preprocessing | Transform


def saved_preprocessing(saved: Mapping[str, Any] | None, transform: Transform | None) -> AnyPreprocessing | None:
    """From what `to_dict` returned; a transform of the user's must be passed, by the name it was saved with.

    Raises:
        InputError: it is missing, or another.
    """
    name = saved.get("transform") if saved else None
    if not isinstance(transform, (Transform, type(None))):
        raise InputError(f"transform must be Transform({name or 'its name'!r}, function); got {transform!r:.80}")
    if name is None and transform is None:
        return Preprocessing(**saved) if saved else None
    if transform is None or name != transform.name:
        wanted = f"the transform {name!r}" if name else "no transform of yours"
        raise InputError(
            f"the model was fitted with {wanted}; "
            + (f"pass it: transform=Transform({name!r}, function)" if name else "leave it out")
        )
    return transform


def _eight_bits(deep: np.ndarray) -> np.ndarray:
    """Pixels of 16-bit files, (H, W) of any integer type, as uint8; row by row, since those in float64 would take
    eight bytes each."""
    shallow = np.empty(deep.shape, np.uint8)
    for row, values in zip(shallow, deep, strict=True):
        row[:] = np.clip(values / 257, 0, 255).round()
    return shallow


def preprocessing_of_weights(weights: str | None) -> Preprocessing | None:
    """The preprocessing an encoder was trained with, if its weights file names it, as those of `ssl-exit train` do."""
    if weights is None or not weights.endswith(".safetensors") or not Path(weights).is_file():
        return None
    try:
        with safe_open(weights, "pt") as file:
            saved = (file.metadata() or {}).get(METADATA)
        return Preprocessing(**json.loads(saved)) if saved else None
    except (SafetensorError, TypeError, ValueError):  # reading the weights will say what is damaged
        return None
