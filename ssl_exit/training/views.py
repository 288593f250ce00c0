"""Random views for contrastive training, drawn for every image anew, in batches, on the device the batch is on.

What is drawn (where to crop, how much to jitter) is drawn on the CPU by torch's global generator, so that no step
waits for a GPU to answer; the pixels stay where they are.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_exit.errors import InputError

ATTEMPTS = 10  # at a crop that fits, as torchvision's RandomResizedCrop makes
GREY = (0.299, 0.587, 0.114)  # ITU-R 601-2 luma


@dataclass(frozen=True)
class PhotoViews:
    """Crop, flip, colour jitter, grey and blur: the views of SimCLR and MoCo v2.

    The same distribution as lightly's SimCLRTransform and MoCoV2Transform (an area and an aspect ratio for the crop;
    brightness, contrast, saturation and hue in random order), without the rounding to whole numbers between steps.
    The defaults are those of lightly's CIFAR-10 benchmark: colour strength 0.5, no blur.

    Attributes:
        size: height and width in pixels of a view.
        scale: least and most share of the image's area in a crop; aspect ratios lie between 3/4 and 4/3.
        flip: probability of exchanging left and right.
        jitter: probability of colour jitter.
        brightness, contrast, saturation: a factor is drawn from [max(0, 1 - it), 1 + it].
        hue: a shift is drawn from [-it, it], in turns of the colour circle.
        grey: probability of a grey view.
        blur: probability of a Gaussian blur; its deviation in pixels is drawn from `sigma`.
    """

    size: int
    scale: tuple[float, float] = (0.08, 1.0)
    flip: float = 0.5
    jitter: float = 0.8
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.1
    grey: float = 0.2
    blur: float = 0.0
    sigma: tuple[float, float] = (0.1, 2.0)

    def __post_init__(self) -> None:
        shares = {name: getattr(self, name) for name in ("flip", "jitter", "grey", "blur")}
        wrong = [name for name, p in shares.items() if not 0 <= p <= 1]
        if wrong or self.size < 1 or not 0 < self.scale[0] <= self.scale[1] <= 1 or not 0 <= self.hue <= 0.5:
            raise InputError(
                "views need size >= 1, 0 < scale <= 1 (least, most), hue in [0, 0.5] and probabilities in [0, 1]; got "
                f"size={self.size}, scale={self.scale}, hue={self.hue}, {shares}"
            )

    def __call__(self, images: Tensor) -> Tensor:
        """One view of every image.

        Args:
            images: (N, C, H, W), uint8 or float in [0, 1], with one channel or three.

        Returns:
            float32 in [0, 1], (N, C, size, size).
        """
        x = images.float() / 255 if images.dtype == torch.uint8 else images.float()
        n, channels, height, width = x.shape
        top, left, tall, wide = random_crops(n, height, width, self.scale)
        mirror = torch.rand(n) < self.flip
        rows = resampling(top, tall, height, self.size, torch.zeros(n, dtype=torch.bool)).to(x.device)
        columns = resampling(left, wide, width, self.size, mirror).to(x.device)
        x = rows[:, None] @ x @ columns[:, None].mT
        x = self._jittered(x)
        if channels == 3 and self.grey:
            chosen = (torch.rand(n) < self.grey).nonzero()[:, 0].to(x.device)
            x[chosen] = luma(x[chosen]).expand(-1, 3, -1, -1)
        if self.blur:
            drawn = (torch.rand(n) < self.blur).nonzero()[:, 0]
            sigma = uniform(len(drawn), *self.sigma).to(x.device)
            drawn = drawn.to(x.device)
            x[drawn] = blurred(x[drawn], sigma, reach=math.ceil(3 * self.sigma[1]))
        return x

    def _jittered(self, x: Tensor) -> Tensor:
        """Colour jitter, its steps in an order drawn for every image; x, (N, C, H, W), is changed in place."""
        widths: dict[Callable[[Tensor, Tensor], Tensor], float] = {
            brightened: self.brightness,
            contrasted: self.contrast,
        }
        if x.shape[1] == 3:
            widths |= {saturated: self.saturation, hue_shifted: self.hue}
        steps = [(change, width) for change, width in widths.items() if width > 0]
        jitter = torch.rand(len(x)) < self.jitter
        order = torch.rand(len(x), len(steps)).argsort(dim=1)
        for turn in range(len(steps)):
            for which, (change, width) in enumerate(steps):
                rows = (jitter & (order[:, turn] == which)).nonzero()[:, 0]
                amount = uniform(len(rows), -width, width) if change is hue_shifted else factors(width, len(rows))
                there = rows.to(x.device)
                x[there] = change(x[there], amount.to(x.device))
        return x


@dataclass(frozen=True)
class DrawingViews:
    """Rotation, scale, shear, shift, brightness and noise: views of handwriting and other drawings.

    Attributes:
        degrees: rotation is drawn from [-it, it].
        stretch: scale, and the aspect ratio, are drawn from [1 - it, 1 + it]; shear from [-it, it].
        shift: drawn from [-it, it], in halves of the image.
        brightness: a factor is drawn from [1 - it, 1 + it].
        noise: deviation of the normal noise on every pixel.
    """

    degrees: float = 20.0
    stretch: float = 0.2
    shift: float = 0.25
    brightness: float = 0.3
    noise: float = 0.1

    def __call__(self, images: Tensor) -> Tensor:
        """One view of every image: (N, C, H, W), uint8 or float in [0, 1] -> float32 of that shape."""
        x = images.float() / 255 if images.dtype == torch.uint8 else images.float()
        n = len(x)

        def draw(width: float, *shape: int) -> Tensor:
            return uniform(n * math.prod(shape), -width, width).view(n, *shape)

        angle, scale = draw(math.radians(self.degrees)), 1 + draw(self.stretch)
        across, shear, shift = scale * (1 + draw(self.stretch)), draw(self.stretch), draw(self.shift, 2)
        rows = [[angle.cos() * scale, shear - angle.sin() * scale, shift[:, 0]]]
        rows += [[angle.sin() * across, angle.cos() * across, shift[:, 1]]]
        warp = torch.stack([torch.stack(row, dim=1) for row in rows], dim=1).to(x.device)  # (N, 2, 3)
        grid = F.affine_grid(warp, list(x.shape), align_corners=False)
        views = F.grid_sample(x, grid, align_corners=False)
        return views * (1 + draw(self.brightness, 1, 1, 1).to(x.device)) + self.noise * torch.randn_like(views)


def random_crops(n: int, height: int, width: int, scale: tuple[float, float]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Top, left, height and width of n crops, (n,) each, drawn as torchvision's RandomResizedCrop draws them.

    A share of the area, uniform in `scale`, and the logarithm of an aspect ratio, uniform between 3/4 and 4/3, are
    drawn until the crop fits; after ten failures it is the largest centred one of a legal ratio.
    """
    low, high = math.log(3 / 4), math.log(4 / 3)
    area = height * width * uniform(n * ATTEMPTS, *scale).view(n, ATTEMPTS)
    ratio = uniform(n * ATTEMPTS, low, high).exp().view(n, ATTEMPTS)
    wide, tall = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
    fits = (wide >= 1) & (wide <= width) & (tall >= 1) & (tall <= height)
    first = fits.int().argmax(dim=1, keepdim=True)
    wide, tall = wide.gather(1, first)[:, 0], tall.gather(1, first)[:, 0]
    top, left = ((torch.rand(n) * (side + 1)).floor() for side in (height - tall, width - wide))
    none = ~fits.any(dim=1)
    whole_wide = min(width, round(height * 4 / 3))
    whole_tall = min(height, round(width / (3 / 4)))
    wide, tall = wide.masked_fill(none, whole_wide), tall.masked_fill(none, whole_tall)
    top = top.masked_fill(none, (height - whole_tall) // 2)
    left = left.masked_fill(none, (width - whole_wide) // 2)
    return top, left, tall, wide


def resampling(start: Tensor, length: Tensor, n: int, size: int, reverse: Tensor) -> Tensor:
    """Weights that cut [start, start + length) out of n pixels and resize it to `size`: (N, size, n).

    A triangle filter as wide as the larger of the two pixels, kept inside the crop: bilinear interpolation,
    anti-aliased where it shrinks, as Pillow resizes.

    Args:
        start, length: of each image's crop along one side, in pixels, (N,).
        n: pixels along that side.
        size: pixels wanted.
        reverse: which images to mirror, (N,) bool.
    """
    stride = (length / size)[:, None, None]
    steps = torch.arange(size)[None, :, None] + 0.5
    steps = torch.where(reverse[:, None, None], size - steps, steps)
    centre = start[:, None, None] + steps * stride
    pixel = torch.arange(n) + 0.5
    weight = (1 - (centre - pixel).abs() / stride.clamp(min=1)).clamp(min=0)
    weight = weight * ((pixel > start[:, None, None]) & (pixel < (start + length)[:, None, None]))
    return weight / weight.sum(dim=2, keepdim=True)


def uniform(n: int, low: float, high: float) -> Tensor:
    """n numbers drawn from [low, high], (n,)."""
    return low + (high - low) * torch.rand(n)


def factors(width: float, n: int) -> Tensor:
    """n factors drawn from [max(0, 1 - width), 1 + width], (n,)."""
    return uniform(n, max(0.0, 1 - width), 1 + width)


def luma(x: Tensor) -> Tensor:
    """Brightness as the eye sees it: (N, C, H, W) -> (N, 1, H, W)."""
    if x.shape[1] == 1:
        return x
    weights = torch.tensor(GREY, device=x.device).view(1, 3, 1, 1)
    return (x * weights).sum(dim=1, keepdim=True)


def brightened(x: Tensor, factor: Tensor) -> Tensor:
    """x times a factor, (N,), kept in [0, 1]."""
    return (x * factor.view(-1, 1, 1, 1)).clamp(0, 1)


def contrasted(x: Tensor, factor: Tensor) -> Tensor:
    """Away from the image's mean luma, or towards it, by a factor, (N,)."""
    mean = luma(x).mean(dim=(1, 2, 3), keepdim=True)
    return torch.lerp(mean, x, factor.view(-1, 1, 1, 1)).clamp(0, 1)


def saturated(x: Tensor, factor: Tensor) -> Tensor:
    """Away from the grey image, or towards it, by a factor, (N,)."""
    return torch.lerp(luma(x).expand_as(x), x, factor.view(-1, 1, 1, 1)).clamp(0, 1)


def hue_shifted(x: Tensor, turn: Tensor) -> Tensor:
    """Hue moved by so many turns of the colour circle, (N,); lightness and saturation (HSV) stay."""
    red, green, blue = x.unbind(1)
    most = x.amax(dim=1)
    chroma = most - x.amin(dim=1)
    unit = chroma.clamp(min=1e-8)
    sextant = torch.where(
        most == red,
        (green - blue) / unit,
        torch.where(most == green, 2 + (blue - red) / unit, 4 + (red - green) / unit),
    )
    sextant = (sextant + 6 * turn.view(-1, 1, 1))[:, None]
    k = (sextant + torch.tensor([5.0, 3.0, 1.0], device=x.device).view(1, 3, 1, 1)) % 6
    return most[:, None] - chroma[:, None] * torch.minimum(k, 4 - k).clamp(0, 1)


def blurred(x: Tensor, sigma: Tensor, reach: int) -> Tensor:
    """Gaussian blur of deviation sigma, (N,), in pixels; edges go on as they end.

    Args:
        reach: pixels to either side that count.
    """
    for side in (2, 3):
        x = x.transpose(side, 3)
        n = x.shape[3]
        padded = F.pad(x, (reach, reach, 0, 0), mode="replicate")
        offset = torch.arange(n + 2 * reach, device=x.device)[:, None] - reach - torch.arange(n, device=x.device)
        weight = torch.exp(-0.5 * (offset / sigma.clamp(min=1e-3).view(-1, 1, 1)) ** 2)  # (N, n + 2 reach, n)
        weight = weight * (offset.abs() <= reach)
        x = (padded @ (weight / weight.sum(dim=1, keepdim=True))[:, None]).transpose(side, 3)
    return x


def light_views(size: int) -> PhotoViews:
    """Crops, flips and brightness only, for self-distillation."""
    return PhotoViews(size, scale=(0.4, 1.0), brightness=0.4, contrast=0.0, saturation=0.0, hue=0.0, grey=0.0)


def simclr_views(size: int) -> PhotoViews:
    """lightly's SimCLRTransform; small images have half the colour strength and no blur, as in its benchmark."""
    if size <= 64:
        return PhotoViews(size)
    return PhotoViews(size, brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2, blur=0.5)


def moco_views(size: int) -> PhotoViews:
    """lightly's MoCoV2Transform; for small images as `simclr_views`, as lightly's benchmark has it."""
    if size <= 64:
        return PhotoViews(size)
    return PhotoViews(size, scale=(0.2, 1.0), blur=0.5)


def shifted(images: Tensor, most: int, mirror: Tensor | None = None) -> Tensor:
    """Every image shifted by up to so many pixels, edges reflected; some mirrored: (N, C, H, W) -> the same.

    Args:
        images: of any range.
        most: pixels.
        mirror: which ones to exchange left and right in, (N,) bool.
    """
    n, _, height, width = images.shape
    padded = F.pad(images, (most,) * 4, mode="reflect")
    rows = torch.randint(2 * most + 1, (n, 1)) + torch.arange(height)
    columns = torch.randint(2 * most + 1, (n, 1)) + torch.arange(width)
    if mirror is not None:
        columns = torch.where(mirror[:, None], columns.flip(1), columns)
    rows, columns = rows.to(images.device), columns.to(images.device)
    each = torch.arange(n, device=images.device)[:, None, None]
    return padded[each, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def with_cuts(images: Tensor, share: float) -> Tensor:
    """Some images with a rectangle of another one in its place: (N, C, H, W) -> the same.

    The rectangle has the image's proportions, an area drawn evenly between none and all of it, and its centre anywhere,
    so that it may reach over the edge (CutMix: Yun et al., arXiv 1905.04899).

    Args:
        images: of any range.
        share: of images that get one, on average.
    """
    n, _, height, width = images.shape
    area, *centre = torch.rand(3, n, 1)
    area = torch.where(torch.rand(n, 1) < share, area, 0.0)
    rows, columns = (
        (torch.arange(size) - middle * size).abs() < area.sqrt() * size / 2
        for size, middle in zip((height, width), centre, strict=True)
    )
    inside = (rows[:, None, :, None] & columns[:, None, None, :]).to(images.device)
    return torch.where(inside, images[torch.randperm(n).to(images.device)], images)
