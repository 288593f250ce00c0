import copy

import pytest
import torch
from torch import nn

from ssl_exit.encoders.front import FrontDescriptor, FrontNetwork, widest_front
from ssl_exit.encoders.opaque import OpaqueEncoder, features_of, multiply_adds
from ssl_exit.encoders.stages import split
from ssl_exit.encoders.tapped import TappedEncoder
from ssl_exit.errors import InputError
from tests.conftest import untrained


def trained_statistics(network):
    """Batch statistics and weights unlike those at the start, so that folding is no identity."""
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 2)
    return network.eval()


def test_features_are_those_of_the_network_on_images_averaged_down():
    network = trained_statistics(FrontNetwork(3, 8))
    images = torch.rand(2, 3, 90, 70)
    by_hand = torch.stack(
        [torch.stack([images[:, :, 3 * i : 3 * i + 3, 3 * j : 3 * j + 3].mean((2, 3)) for j in range(24)], -1)
         for i in range(30)], -2
    )  # fmt: skip
    with torch.no_grad():
        assert torch.allclose(FrontDescriptor(network, (3, 90, 70), 32)(images), network(by_hand), atol=1e-5)
        assert torch.equal(FrontDescriptor(network, (3, 90, 70), 90)(images), network(images))


def test_multiply_adds_by_hand():
    w, maps = 8, [16 * 16, 8 * 8, 4 * 4]
    expected = 3 * 9 * w * maps[0] + 2 * w * w * 9 * maps[0]
    for before, channels, positions in ((w, 2 * w, maps[1]), (2 * w, 4 * w, maps[2])):
        expected += (before * channels * 9 + channels * channels * 9 + before * channels) * positions
    front = FrontDescriptor(FrontNetwork(3, w), (3, 32, 32), 64)
    assert (front.macs, front.dim) == (expected, 4 * w)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_rewriting_for_speed_keeps_features_and_the_front(precision):
    front = FrontDescriptor(trained_statistics(FrontNetwork(3, 8)), (3, 32, 32), 16).eval()
    before = copy.deepcopy(front.network.state_dict())
    fast, images = front.for_inference(precision), torch.randn(4, 3, 32, 32)
    dtype = next(fast.network.parameters()).dtype
    with torch.no_grad():
        expected, features = front(images), fast(images.to(dtype))
    assert features.dtype == torch.float32
    assert torch.allclose(features, expected, atol=1e-4 if precision == "float32" else 0.1, rtol=0.1)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fast.network.modules())
    assert all(torch.equal(before[k], v) for k, v in front.network.state_dict().items())


def test_a_front_whose_code_depends_on_strides_runs_as_it_is():
    class Viewing(nn.Module):
        def forward(self, x):
            return x.view(len(x), -1)[:, :5]

    front = FrontDescriptor(Viewing(), (3, 8, 8), 8)
    images = torch.rand(3, 3, 8, 8)
    assert torch.equal(front.for_inference("float32")(images), images.flatten(1)[:, :5])


@pytest.mark.parametrize(
    ("network", "message"), [(nn.Conv2d(3, 4, 3), "one vector of features"), (nn.Linear(7, 2), "cannot take images")]
)
def test_a_module_that_is_no_front_is_refused(network, message):
    with pytest.raises(InputError, match=message):
        FrontDescriptor(network, (3, 8, 8), 8)


def test_the_widest_front_keeps_to_its_budgets():
    def width(macs, affordable=lambda front: True, fixed=None):
        return widest_front((3, 32, 32), 32, 1, macs, fixed, affordable).network.config["width"]

    widest = width(5e6)
    assert FrontDescriptor(FrontNetwork(3, widest), (3, 32, 32), 32).macs <= 5e6
    assert FrontDescriptor(FrontNetwork(3, widest + 4), (3, 32, 32), 32).macs > 5e6
    assert 8 < width(5e6, lambda front: front.network.config["width"] <= 13) <= 13
    assert width(1.0) == width(5e6, lambda front: False) == 8  # nothing smaller is built
    assert width(1.0, fixed=20) == 20


def test_stages_behind_fronts_see_the_images(rgb_digits):
    encoder, images = untrained("resnet20", rgb_digits), rgb_digits[:4]
    fronts = [FrontDescriptor(trained_statistics(FrontNetwork(3, w)), (3, 32, 32), 32).eval() for w in (8, 12)]
    tapped = TappedEncoder.build(encoder, ["layer2"], images, fronts=fronts).eval()
    assert [p.name for p in tapped.staged.exit_points][:2] == ["front1", "front2"]
    assert tapped.staged.macs[:2] == [0, 0]
    with torch.no_grad():
        descriptors, features = tapped(images)
        assert torch.equal(features, encoder(images))
        assert torch.equal(descriptors[:, :32], fronts[0](images))
        assert torch.equal(descriptors[:, 32:80], fronts[1](images))
    assert tapped.columns[0] == slice(0, 32)
    assert tapped.columns[1] == slice(0, 80)


class Output(dict):
    """As transformers has it: a mapping whose entries are attributes."""

    __getattr__ = dict.get


@pytest.mark.parametrize(
    "wrap",
    [
        lambda f: f,
        lambda f: (f, None),
        lambda f: f.numpy(),
        lambda f: Output(pooler_output=f, last_hidden_state=f[:, None]),
        lambda f: Output(pooler_output=None, last_hidden_state=f),
    ],
    ids=["tensor", "tuple", "array", "pooled", "tokens"],
)
def test_an_opaque_encoder_gives_its_features_however_it_returns_them(wrap):
    images = torch.rand(3, 3, 4, 4)
    encoder = OpaqueEncoder(lambda x: wrap(x.mean((2, 3))))
    assert torch.allclose(encoder(images), images.mean((2, 3)))
    assert torch.equal(copy.deepcopy(encoder)(images), encoder(images))


class WithProperties:
    def __init__(self, features):
        self._features = features

    @property
    def pooler_output(self):
        return self._features


def test_properties_count_and_so_do_fused_layers():
    images = torch.rand(3, 3, 4, 4)
    assert torch.equal(features_of(WithProperties(images.flatten(1)), images), images.flatten(1))
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    expected = 6 * (4 * 8 * 8 + 2 * 8 * 16) + 2 * 6 * 6 * 8  # projections, hidden layers, and attention of 6 tokens
    assert multiply_adds(OpaqueEncoder(lambda x: layer(x.flatten(2)[:, :, :16].reshape(-1, 6, 8))), images) == expected


def test_a_model_is_measured_and_built_without_a_trace():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten())
    network[1].eval()
    state = torch.get_rng_state()
    FrontDescriptor(network, (3, 8, 8), 8)
    FrontDescriptor.from_config(FrontDescriptor(FrontNetwork(3, 8), (3, 8, 8), 8).config)
    assert not network[1].training
    assert network[0].training
    torch.set_rng_state(state)


@pytest.mark.parametrize("result", [None, {}, torch.zeros(3), torch.zeros(2, 4), "features", []])
def test_anything_else_is_refused(result):
    with pytest.raises(InputError, match="must return features of 3 images"):
        features_of(result, torch.zeros(3, 3, 4, 4))


def test_an_encoder_that_cannot_be_traced_is_one_stage():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(48, 5)

        def forward(self, x):
            return {"pooler_output": self.linear(x.flatten(1)) if float(x.sum()) > 0 else x.flatten(1)}

    encoder, images = Branching(), torch.rand(3, 3, 4, 4)
    staged = split(encoder, [], images)
    assert staged.macs == [48 * 5]
    assert torch.equal(staged(images), encoder(images)["pooler_output"])
    with pytest.raises(InputError, match=r"front='auto'"):
        split(encoder, "auto", images)
    assert multiply_adds(OpaqueEncoder(lambda x: x.numpy().mean((2, 3))), images) == 0
    with pytest.raises(InputError, match="cannot take images of shape"):
        split(encoder, [], torch.rand(1, 3, 5, 5))
