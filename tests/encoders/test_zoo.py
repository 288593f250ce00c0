"""A small zoo: architectures of many kinds are cut, and their stages compute what they compute."""

import pytest
import timm
import torch
import torchvision

from ssl_exit.encoders.graph import list_exits
from ssl_exit.encoders.stages import split
from ssl_exit.encoders.tapped import TappedEncoder
from ssl_exit.errors import InputError

SMALL = {  # what is peculiar
    "timm:test_resnet": 32,  # the plain case
    "timm:test_vit": 160,
    "timm:test_byobnet": 32,
    "timm:test_convnext": 32,
    "timm:test_efficientnet_ln": 32,
    "timm:lcnet_035": 32,
    "timm:levit_128s": 32,  # keeps biases that it computed from parameters
    "timm:efficientvit_m0": 32,
    "timm:pit_ti_224": 32,  # uses the batch size of its input to the end
    "timm:deit_tiny_distilled_patch16_224": 32,  # two class tokens
    "timm:gmlp_ti16_224": 32,
    "timm:xcit_nano_12_p16_224": 32,  # positions by the size of the map
    "timm:edgenext_xx_small": 32,
    "timm:starnet_s050": 32,
    "timm:ghostnet_050": 32,
    "mobilenet_v3_small": 32,
    "shufflenet_v2_x0_5": 32,
    "squeezenet1_1": 32,
}
LARGE = {
    "timm:mvitv2_tiny": 32,  # functions that are not traced return sizes beside tensors
    "timm:naflexvit_base_patch16_gap": 32,  # and None
    "timm:qwen3_vit_88m": 32,
    "timm:efficientformerv2_s0": 32,
    "timm:swin_tiny_patch4_window7_224": 32,
    "timm:davit_tiny": 32,
    "timm:twins_svt_small": 32,
    "timm:coat_tiny": 32,  # three branches at its end
    "densenet121": 32,
}


class Gated(torch.nn.Conv2d):
    def __init__(self):
        super().__init__(3, 4, 3)

    def forward(self, x):
        return super().forward(x) if x.mean() > 0 else super().forward(-x)


def network(name, size):
    """With random weights and no layer that starts at zero."""
    torch.manual_seed(0)
    if name.startswith("timm:") and not timm.is_model(name[5:]):
        pytest.skip(f"needs a timm that has {name[5:]}")
    if not name.startswith("timm:"):
        model = torchvision.models.get_model(name, weights=None)
    else:
        try:
            model = timm.create_model(name[5:], num_classes=0, img_size=size)
        except TypeError:  # images of any size
            model = timm.create_model(name[5:], num_classes=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    return model.eval()


def check(name, size):
    model, images = network(name, size), torch.randn(3, 3, size, size)
    points = list_exits(model, images)
    assert sum(0.01 <= point.cost <= 0.95 for point in points) >= 3
    staged = split(model, [point.name for point in points], images)
    with torch.no_grad():
        whole = model(images)
        assert torch.equal(staged(images), whole)
        torch.testing.assert_close(staged(images[1:2]), whole[1:2], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", SMALL)
def test_stages_one_after_another_are_the_encoder(name):
    check(name, SMALL[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_stages_of_larger_ones_are_the_encoder(name):
    check(name, LARGE[name])


def test_an_encoder_of_two_branches_says_that_it_has_no_exit():
    model, images = network("timm:crossvit_9_240", 240), torch.randn(1, 3, 240, 240)
    with pytest.raises(InputError, match="no exit point between 5 % and 95 %"):
        TappedEncoder.build(model, "auto", images)


def test_an_encoder_that_looks_at_its_images_says_what_to_do():
    with pytest.raises(InputError, match=r"cannot be cut.*front='auto'.*list of modules") as error:
        list_exits(Gated().eval(), torch.randn(1, 3, 8, 8))
    assert "symbolically" not in str(error.value)
