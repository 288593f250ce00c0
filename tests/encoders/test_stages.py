"""Stages: bit-identical to the unsplit encoder, resumable on a part of the batch."""

import copy

import pytest
import timm
import torch
import torchvision
from torch import nn

from ssl_exit.encoders.graph import ExitPoint, list_exits
from ssl_exit.encoders.stages import choose_exits, split
from ssl_exit.errors import InputError
from tests.conftest import tensors_of, untrained

ARCHITECTURES = {
    "resnet20": None,
    "mobilenet": None,
    "vit": None,
    "swin": lambda: torchvision.models.swin_t(),
    "convnext": lambda: torchvision.models.convnext_tiny(),
    "timm vit": lambda: timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=0),
    "timm rotary": lambda: timm.create_model("vit_small_patch16_dinov3", img_size=32, num_classes=0, depth=3),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_stages_equal_the_encoder_bit_for_bit(name, rgb_digits):
    make = ARCHITECTURES[name]
    encoder = make().eval() if make else untrained(name, rgb_digits)
    images = rgb_digits[:6]
    staged = split(encoder, "auto", images).eval()
    with torch.no_grad():
        whole = encoder(images)
        assert torch.equal(staged(images), whole)
        tensor = tensors_of(staged, images)[1][[1, 4]]
        for stage in staged.stages[2:]:
            tensor = stage(tensor)
    torch.testing.assert_close(tensor, whole[[1, 4]], rtol=1e-4, atol=1e-5)
    assert sum(staged.macs) > 0
    assert min(staged.macs) >= 0


@torch.fx.wrap
def rows_of(height):
    return torch.arange(float(height))[:, None]


class ByShape(nn.Module):
    """Later layers use what depends on height and width, and on the size of the batch."""

    def __init__(self, per_image):
        super().__init__()
        self.first, self.second, self.per_image = (
            nn.Conv2d(3, 4, 3, padding=1),
            nn.Conv2d(4, 4, 3, padding=1),
            per_image,
        )

    def forward(self, x):
        n, _, h, w = x.shape
        rows = rows_of(h)
        bias = x.new_ones(n, 1, h, w) if self.per_image else rows / h
        y = self.first(x) + bias
        return (self.second(y) * bias + w).view(n, -1)


@pytest.mark.parametrize("per_image", [False, True])
def test_what_depends_on_the_shape_of_images_only_blocks_no_exit(per_image, rgb_digits):
    encoder = ByShape(per_image).eval()
    names = [point.name for point in list_exits(encoder, rgb_digits[:1])]
    assert {"first", "add", "second"} <= set(names)
    staged = split(encoder, names, rgb_digits[:1])
    with torch.no_grad():
        for images in (rgb_digits[:5], rgb_digits[:1]):
            assert torch.equal(staged(images), encoder(images))
            assert torch.equal(
                copy.deepcopy(staged).double()(images.double()), copy.deepcopy(encoder).double()(images.double())
            )
    assert not list(encoder.buffers())


@torch.fx.wrap
def sides_of(x):
    return None, [*x.shape[2:]]


def test_numbers_that_no_pixel_changes_block_no_exit_and_others_do(rgb_digits):
    class Sized(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)

        def forward(self, x):
            nothing, (h, w) = (pair := sides_of(x))[0], (pair[1][0], pair[1][1])
            x = self.second(self.first(x))
            return torch.nn.functional.interpolate(x, (h, w), nothing).mean((2, 3))

    class Ranked(Sized):
        def forward(self, x):
            place = rows_of(x.shape[0])[:, :, None, None]  # of an image in the batch
            return (self.second(self.first(x)) + place).mean((2, 3))

    encoder = Sized().eval()
    names = [point.name for point in list_exits(encoder, rgb_digits[:1])]
    assert {"first", "second"} <= set(names)
    with torch.no_grad():
        assert torch.equal(split(encoder, names, rgb_digits[:1])(rgb_digits[:5]), encoder(rgb_digits[:5]))
    assert [point.name for point in list_exits(Ranked(), rgb_digits[:1])] == ["add"]


def test_named_exits_are_put_in_order_and_once(rgb_digits):
    encoder = untrained("resnet20", rgb_digits)
    staged = split(encoder, ["layer3.0", "layer1", "layer1.2"], rgb_digits[:1])
    assert [p.name for p in staged.exit_points] == ["layer1.2.relu_1", "layer3.0.relu_1"]
    assert tensors_of(staged, rgb_digits[:2])[0].shape == (2, 16, 32, 32)
    with pytest.raises(InputError, match='must be "auto" or a list'):
        split(encoder, "layer1", rgb_digits[:1])


def test_parameters_are_shared(rgb_digits):
    encoder = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3))
    staged = split(encoder, ["0"], rgb_digits[:1])
    assert {id(p) for p in staged.parameters()} == {id(p) for p in encoder.parameters()}


def test_auto_spreads_exits_over_the_cost_and_takes_the_last_of_equal_points():
    costs = [0.01, 0.1, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 1.0]
    points = [ExitPoint(str(i), (1,), cost) for i, cost in enumerate(costs)]
    assert choose_exits(points) == [2, 3, 4, 5, 6]
    assert choose_exits(points, most=1) == [4]
    assert choose_exits(points[-2:]) == []
    narrow = [ExitPoint("wide", (64, 8, 8), 0.11), ExitPoint("narrow", (8, 8, 8), 0.13), ExitPoint("far", (1,), 0.17)]
    assert choose_exits(narrow)[:2] == [1, 2]  # near 1/9 and near 2/9
    assert choose_exits([ExitPoint("wide", (9216,), 0.5), ExitPoint("map", (9216, 2, 2), 0.6)]) == [1]
