"""Views in batches are those of Pillow, torchvision and lightly, one image at a time."""

import colorsys

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as TF
from hypothesis import given
from hypothesis import strategies as st
from lightly.transforms.moco_transform import MoCoV2Transform
from lightly.transforms.simclr_transform import SimCLRTransform
from PIL import Image
from scipy.ndimage import gaussian_filter
from scipy.stats import ks_2samp
from sklearn.datasets import load_sample_image

from ssl_exit.errors import InputError
from ssl_exit.training.views import (
    DrawingViews,
    PhotoViews,
    blurred,
    brightened,
    contrasted,
    hue_shifted,
    moco_views,
    random_crops,
    resampling,
    saturated,
    simclr_views,
)

RAW = {"mean": [0.0] * 3, "std": [1.0] * 3}


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    """Halves of two photographs, 32 x 32."""
    china, flower = (Image.fromarray(load_sample_image(f"{name}.jpg")).resize((32, 32)) for name in ("china", "flower"))
    flower.paste(china.crop((0, 0, 16, 32)))
    return flower


@pytest.fixture(scope="module")
def photos() -> torch.Tensor:
    """Six pieces of two photographs, (6, 3, 48, 40) in [0, 1]."""
    whole = [torch.tensor(load_sample_image(name)).permute(2, 0, 1) for name in ("china.jpg", "flower.jpg")]
    return torch.stack([w[:, a : a + 96 : 2, a : a + 80 : 2] for w in whole for a in (100, 200, 300)]) / 255


@pytest.mark.parametrize("size", [8, 20, 64])
@pytest.mark.parametrize("mirror", [False, True])
def test_crops_are_resized_as_pillow_resizes_them(photo, size, mirror):
    pixels = torch.from_numpy(np.array(photo)).permute(2, 0, 1)[None].float()
    for top, left, tall, wide in [(0, 0, 32, 32), (3, 7, 20, 11), (30, 0, 2, 32), (5, 5, 1, 1)]:
        rows = resampling(torch.tensor([top]), torch.tensor([tall]), 32, size, torch.tensor([False]))
        columns = resampling(torch.tensor([left]), torch.tensor([wide]), 32, size, torch.tensor([mirror]))
        ours = (rows[:, None] @ pixels @ columns[:, None].mT)[0].permute(1, 2, 0)
        theirs = photo.crop((left, top, left + wide, top + tall)).resize((size, size), Image.Resampling.BILINEAR)
        theirs = np.array(theirs)[:, ::-1] if mirror else np.array(theirs)
        np.testing.assert_allclose(ours.numpy(), theirs, atol=1.01)  # Pillow rounds twice


@given(st.integers(1, 60), st.integers(1, 60), st.floats(0.01, 1), st.floats(0.01, 1), st.integers(0, 2**31))
def test_crops_lie_inside_the_image(height, width, a, b, seed):
    torch.manual_seed(seed)
    top, left, tall, wide = random_crops(50, height, width, (min(a, b), max(a, b)))
    for start, length, side in ((top, tall, height), (left, wide, width)):
        assert (length >= 1).all()
        assert (start >= 0).all()
        assert (start + length <= side).all()
        assert (start == start.round()).all()


def test_an_image_too_long_for_any_crop_gives_its_middle():
    top, left, tall, wide = random_crops(20, 10, 400, (1.0, 1.0))
    assert (top == 0).all()
    assert (tall == 10).all()
    assert (wide == 13).all()
    assert (left == 193).all()


@pytest.mark.parametrize(
    ("ours", "theirs", "amounts"),
    [
        (brightened, TF.adjust_brightness, [0.2, 0.9, 1.0, 1.8]),
        (contrasted, TF.adjust_contrast, [0.2, 0.9, 1.0, 1.8]),
        (saturated, TF.adjust_saturation, [0.0, 0.9, 1.0, 1.8]),
        (hue_shifted, TF.adjust_hue, [-0.5, -0.1, 0.0, 0.3]),
    ],
)
def test_colour_changes_are_those_of_torchvision(photos, ours, theirs, amounts):
    for amount in amounts:
        got = ours(photos, torch.full((len(photos),), amount))
        np.testing.assert_allclose(got, theirs(photos, amount), atol=2e-3)  # torchvision rounds its luma weights


def test_amounts_are_each_images_own(photos):
    amounts = torch.linspace(0.3, 1.7, len(photos))
    together = contrasted(photos, amounts)
    alone = torch.cat([contrasted(photos[i : i + 1], amounts[i : i + 1]) for i in range(len(photos))])
    assert torch.equal(together, alone)


def test_hue_by_hand():
    red, third = torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1, 1), torch.tensor([1 / 3])
    np.testing.assert_allclose(hue_shifted(red, third).flatten(), [0, 1, 0], atol=1e-5)
    colour = (0.8, 0.3, 0.5)
    h, s, v = colorsys.rgb_to_hsv(*colour)
    expected = colorsys.hsv_to_rgb((h + 0.2) % 1, s, v)
    got = hue_shifted(torch.tensor(colour).view(1, 3, 1, 1), torch.tensor([0.2]))
    np.testing.assert_allclose(got.flatten(), expected, atol=1e-5)


def test_blur_is_a_gaussian_with_edges_that_go_on(photos):
    sigma = torch.tensor([0.1, 0.5, 0.9, 1.2, 1.6, 2.0])
    got = blurred(photos, sigma, reach=6)
    for i, s in enumerate(sigma.tolist()):
        for channel in range(3):
            expected = gaussian_filter(photos[i, channel].numpy(), s, mode="nearest", radius=6)
            np.testing.assert_allclose(got[i, channel], expected, atol=1e-4)


def summaries(views: torch.Tensor, whole: torch.Tensor) -> dict[str, np.ndarray]:
    """What a view looks like, in numbers: (N, 3, H, W) -> (N,) each."""
    red, green, blue = views.mean(dim=(2, 3)).unbind(1)
    luma = views.mean(dim=1)
    return {
        "red": red,
        "red less green": red - green,
        "green less blue": green - blue,
        "green": green,
        "blue": blue,
        "contrast": luma.std(dim=(1, 2)) / luma.mean(dim=(1, 2)),
        "colour": (views.amax(1) - views.amin(1)).mean(dim=(1, 2)) / views.amax(1).mean(dim=(1, 2)),
        "edges across": luma.diff(dim=2).abs().mean(dim=(1, 2)),
        "edges down": luma.diff(dim=1).abs().mean(dim=(1, 2)),
        "slope across": luma[:, :, 16:].mean(dim=(1, 2)) - luma[:, :, :16].mean(dim=(1, 2)),
        "slope down": luma[:, 16:].mean(dim=(1, 2)) - luma[:, :16].mean(dim=(1, 2)),
        "likeness": (luma * whole).mean(dim=(1, 2)),
    }


def p_values(photo: Image.Image, ours: PhotoViews, theirs) -> dict[str, float]:
    n = 1000
    pixels = torch.from_numpy(np.array(photo)).permute(2, 0, 1)[None]
    whole = pixels[0].float().mean(0) / 255
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002  lightly's blur draws from it
    one = summaries(ours(pixels.expand(n, -1, -1, -1)), whole)
    two = summaries(torch.stack([theirs(photo)[0] for _ in range(n)]), whole)
    return {name: float(ks_2samp(one[name].nan_to_num(), two[name].nan_to_num()).pvalue) for name in one}


@pytest.mark.parametrize("name", ["simclr", "moco", "simclr with blur", "large crops"])
def test_views_are_distributed_as_lightlys(photo, name):
    ours, theirs = {
        "simclr": (simclr_views(32), SimCLRTransform(32, cj_strength=0.5, gaussian_blur=0.0, normalize=RAW)),
        "moco": (PhotoViews(32, scale=(0.2, 1.0)), MoCoV2Transform(32, gaussian_blur=0.0, normalize=RAW)),
        "simclr with blur": (
            PhotoViews(32, brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2, blur=0.5),
            SimCLRTransform(32, normalize=RAW),
        ),
        "large crops": (
            PhotoViews(32, scale=(0.5, 1.0)),
            SimCLRTransform(32, cj_strength=0.5, gaussian_blur=0.0, min_scale=0.5, normalize=RAW),
        ),
    }[name]
    found = p_values(photo, ours, theirs)
    assert min(found.values()) > 1e-4, found


@pytest.mark.parametrize(
    "other",
    [
        {"scale": (0.3, 1.0)},
        {"flip": 0.3},
        {"brightness": 0.2},
        {"contrast": 0.2},
        {"saturation": 0.9},
        {"hue": 0.2},
        {"grey": 0.1},
        {"blur": 0.3},
    ],
)
def test_that_comparison_sees_a_difference(photo, other):
    scale = 0.08 if "scale" in other else 0.5
    theirs = SimCLRTransform(32, cj_strength=0.5, gaussian_blur=0.0, min_scale=scale, normalize=RAW)
    assert min(p_values(photo, PhotoViews(32, **{"scale": (0.5, 1.0)} | other), theirs).values()) < 1e-4


def test_presets_for_large_images_are_lightlys_defaults():
    large = simclr_views(224)
    assert (large.brightness, large.hue, large.scale, large.blur) == (0.8, 0.2, (0.08, 1.0), 0.5)
    assert (moco_views(224).scale, moco_views(224).hue, moco_views(224).blur) == ((0.2, 1.0), 0.1, 0.5)


def test_views_of_every_image_are_its_own_and_repeat_with_the_seed(photos):
    torch.manual_seed(0)
    one, two = PhotoViews(32)(photos[:1].expand(4, -1, -1, -1)), PhotoViews(32)(photos)
    assert all((one[i] - one[j]).abs().mean() > 0.01 for i in range(4) for j in range(i))
    torch.manual_seed(0)
    assert torch.equal(PhotoViews(32)(photos[:1].expand(4, -1, -1, -1)), one)
    assert two.shape == (6, 3, 32, 32)
    assert two.min() >= 0
    assert two.max() <= 1


def test_grey_images_and_uint8(photos):
    grey = (photos[:, :1] * 255).to(torch.uint8)
    views = PhotoViews(24, blur=0.5)(grey)
    assert views.shape == (6, 1, 24, 24)
    assert 0.05 < views.mean() < 0.95


def test_drawings_differ_from_each_other_and_keep_their_shape(digits):
    torch.manual_seed(0)
    one, two = DrawingViews()(digits[:8]), DrawingViews()(digits[:8])
    assert one.shape == digits[:8].shape
    assert (one - two).abs().mean() > 0.05
    assert np.corrcoef(one.flatten(), digits[:8].flatten())[0, 1] > 0.3


@pytest.mark.parametrize("wrong", [{"size": 0}, {"scale": (0.0, 1.0)}, {"grey": 1.5}, {"hue": 0.6}])
def test_views_that_cannot_be(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        PhotoViews(**{"size": 32} | wrong)
