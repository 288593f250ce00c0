"""Preprocessing against torchvision's transforms."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from ssl_exit import Preprocessing, Transform
from ssl_exit.data.preprocessing import saved_preprocessing
from ssl_exit.errors import InputError

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8))


def test_equals_resize_crop_and_normalise():
    ours = Preprocessing(32, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), crop=0.8)(PICTURE)
    theirs = v2.Compose(
        [
            v2.PILToTensor(),
            v2.Resize(40, antialias=True),
            v2.CenterCrop(32),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize((0.5, 0.4, 0.3), (0.2, 0.3, 0.4)),
        ]
    )
    torch.testing.assert_close(ours, theirs(PICTURE))


def test_one_by_one_equals_a_batch():
    pixels = torch.randint(0, 256, (4, 3, 20, 24), dtype=torch.uint8)
    prepare = Preprocessing(16)
    torch.testing.assert_close(prepare(pixels), torch.stack([prepare(one) for one in pixels]))


def test_pixels_of_the_right_size_are_only_scaled():
    pixels = torch.randint(0, 256, (1, 8, 8), dtype=torch.uint8)
    torch.testing.assert_close(Preprocessing(8, (0.0,), (1.0,))(pixels), pixels / 255)
    assert pixels.dtype == torch.uint8


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"size": 0}, "size must be a whole number from 1"),
        ({"size": 8, "crop": 0.0}, "crop in"),
        ({"size": 8, "mean": (0.5, 0.5), "std": (1.0, 1.0)}, "1 .grey. or 3"),
        ({"size": 8, "std": (0.0, 1.0, 1.0)}, "every std above 0"),
    ],
)
def test_wrong_parameters_are_refused(kwargs, message):
    with pytest.raises(InputError, match=message):
        Preprocessing(**kwargs)


def test_wrong_pixels_are_refused():
    with pytest.raises(InputError, match="takes uint8 images"):
        Preprocessing(8)(torch.zeros(3, 8, 8))
    with pytest.raises(InputError, match="takes uint8 images"):
        Preprocessing(8)(torch.zeros(1, 8, 8, dtype=torch.uint8))


def test_a_transform_is_a_name_and_a_function():
    for wrong in (("x", None), (None, np.asarray), (np.asarray, "x")):
        with pytest.raises(InputError, match="a Transform is a name and a function"):
            Transform(*wrong)
    with pytest.raises(InputError, match=r"transform must be Transform\('mine', function\)"):
        saved_preprocessing({"transform": "mine"}, np.asarray)
