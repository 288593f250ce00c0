"""Exit points: legal ones are found, others refused with advice."""

import threading

import pytest
import pytorch_lightning as pl
import timm
import torch
import torchvision
from torch import nn

from ssl_exit import list_exits
from ssl_exit.encoders import graph
from ssl_exit.encoders.graph import as_module, trace
from ssl_exit.encoders.small import digits_encoder, resnet20_cifar
from ssl_exit.encoders.stages import split
from ssl_exit.errors import InputError
from tests.conftest import untrained

IMAGES = torch.zeros(1, 3, 32, 32)


def test_resnet20_points_costs_and_shapes():
    points = {p.name: p for p in list_exits(resnet20_cifar(), IMAGES)}
    assert points["layer1.0.relu_1"].shape == (16, 32, 32)
    assert points["layer3.2.relu_1"].shape == (64, 8, 8)
    stem = 16 * 3 * 9 * 32 * 32
    whole = stem + 6 * 16 * 16 * 9 * 1024 + (16 * 32 + 5 * 32 * 32) * 9 * 256 + (32 * 64 + 5 * 64 * 64) * 9 * 64
    assert trace(resnet20_cifar(), IMAGES).macs == whole
    assert points["relu"].cost == pytest.approx(stem / whole)
    assert points["layer3.2.relu_1"].cost == 1
    assert "flatten" not in points
    assert "layer1.0.conv1" not in points  # the shortcut crosses there too


def test_macs_agree_with_torchvision():
    for name in ("resnet18", "vit_b_32"):  # attention must be counted
        model = torchvision.models.get_model(name)
        published = torchvision.models.get_model_weights(name).DEFAULT.meta["_ops"] * 1e9
        assert trace(model, torch.zeros(1, 3, 224, 224)).macs == pytest.approx(published, rel=0.01)


def test_optional_inputs_are_bound_to_their_defaults():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)

        def forward(self, x, mask=None, causal: bool = False):
            x = self.a(x)
            if mask is not None:
                x = x * mask
            return self.b(x if not causal else -x)

    assert [p.name for p in list_exits(Masked(), IMAGES)] == ["a"]

    class Flagged(Masked):
        def forward(self, x, both: bool = True, scale: int = 2, mask=None):
            return self.b(self.a(x)) * scale if both else self.a(x)

    traced = trace(Flagged(), IMAGES)
    assert [p.name for p in traced.points] == ["a", "b"]
    assert sum(node.op == "placeholder" for node in traced.graph.nodes) == 1
    with torch.no_grad():
        assert torch.equal(split(module := Flagged(), ["a"], IMAGES)(IMAGES), module(IMAGES))
    timm_vit = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=0)
    assert len(list_exits(timm_vit, IMAGES)) > 20


def test_parameters_do_not_hide_exit_points():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, x):
            scale = self.scale * 2
            x = self.a(x) * scale
            return self.b(x) * scale

    assert {"a", "mul_1", "b"} <= {p.name for p in list_exits(Scaled(), IMAGES)}


def test_a_tensor_without_the_batch_in_front_is_no_exit_point():
    class Turned(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            turned = self.conv(x).transpose(0, 1)
            return turned.relu().transpose(0, 1).mean((2, 3))

    assert [p.name for p in list_exits(Turned(), IMAGES)] == ["conv", "transpose_1"]


def test_the_output_itself_is_no_exit_point():
    assert [p.name for p in list_exits(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), IMAGES)] == ["0"]


def test_module_names_mean_their_last_node_and_illegal_names_get_advice():
    traced = trace(resnet20_cifar(), IMAGES)
    assert traced.points[traced.resolve("layer2")].name == "layer2.2.relu_1"
    with pytest.raises(InputError, match=r"'layer1.1.conv1' is not an exit point.*layer1\.0\.relu_1"):
        traced.resolve("layer1.1.conv1")
    with pytest.raises(InputError, match=r"'layer9' names no node of CifarResNet; nearest legal: \["):
        traced.resolve("layer9")


def test_an_encoder_that_cannot_be_traced_names_the_line_and_offers_manual_stages():
    class Branching(nn.Module):
        def forward(self, x):
            if x.sum() > 0:  # the offending line
                return x
            return -x

    with pytest.raises(InputError, match=r"test_graph\.py, line \d+: if x\.sum\(\) > 0.*list of modules"):
        list_exits(Branching(), IMAGES)


def test_manual_stages():
    class Branching(nn.Module):
        def forward(self, x):
            return x * 2 if float(x.sum()) > 0 else x * 3

    stages = [twice := Branching(), nn.Conv2d(3, 4, 3), twice]
    assert [p.name for p in list_exits(stages, IMAGES)] == ["stage0", "stage1"]
    images = torch.rand(2, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(split(stages, ["stage0"], images)(images), twice(stages[1](twice(images))))


@pytest.mark.parametrize(
    ("encoder", "example", "message"),
    [
        (resnet20_cifar(), torch.zeros(1, 1, 32, 32), "cannot take images of shape"),
        (resnet20_cifar(), torch.zeros(0, 3, 32, 32), "N >= 1"),
        (resnet20_cifar(), torch.zeros(1, 3, 32, 32).double(), "float64"),
        ([], IMAGES, "list of them"),
        ("resnet", IMAGES, "torch.nn.Module"),
    ],
)
def test_wrong_input_is_refused(encoder, example, message):
    with pytest.raises(InputError, match=message):
        list_exits(encoder, example)


def test_more_than_one_output_is_refused():
    class Two(nn.Module):
        def forward(self, x):
            return x, x + 1

    with pytest.raises(InputError, match="one tensor"):
        list_exits(Two(), IMAGES)


class Cached(nn.Module):
    """Computes something once from its parameters and keeps it, as levit and its kin do in timm."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)
        self.biases, self.cache = nn.Parameter(torch.randn(4, 1, 1)), {}

    def forward(self, x):
        key = str(x.device)
        if key not in self.cache:
            self.cache[key] = self.biases * 2
        return (self.second(self.first(x)) + self.cache[key]).mean((2, 3))


@pytest.mark.parametrize("warm", [False, True])
def test_what_a_forward_keeps_while_it_is_traced_does_not_stay(warm, rgb_digits):
    encoder = Cached().eval()
    if warm:
        encoder(rgb_digits[:1])  # with gradients: what is kept is no leaf of autograd
    attributes, cache = set(vars(encoder)), dict(encoder.cache)
    for _ in range(2):
        names = [point.name for point in list_exits(encoder, rgb_digits[:1])]
        assert names == ["first", "second", "add"]
        staged = split(encoder, names, rgb_digits[:1])
        assert set(vars(encoder)) == attributes
        assert encoder.cache == cache
        with torch.no_grad():
            assert torch.equal(staged(rgb_digits[:3]), Cached.forward(encoder, rgb_digits[:3]))
        assert {id(p) for p in staged.parameters()} <= {id(p) for p in encoder.parameters()}
        encoder.cache, cache = {}, {}


def test_messages_say_what_to_do_and_not_what_tracing_said(rgb_digits):
    class Locked(nn.Conv2d):
        def __init__(self):
            super().__init__(3, 4, 3)
            self.lock = threading.Lock()

    class Filled(nn.Module):
        def forward(self, x):
            x[:, 0] = 1
            return x

    for encoder, message in ((Locked(), "copy.deepcopy"), (Filled(), "front='auto'")):
        with pytest.raises(InputError, match=message) as error:
            list_exits(encoder, rgb_digits[:1])
        assert "Proxy" not in str(error.value)
        assert "\n" not in str(error.value)


def test_a_graph_that_does_not_run_is_told_from_images_that_do_not_fit(rgb_digits):
    class Typed(nn.Conv2d):
        def forward(self, x):
            return super().forward(x if isinstance(x, torch.Tensor) else x[:, :2])

    with pytest.raises(InputError, match=r"Typed cannot be cut: its graph.*front='auto'"):
        list_exits(Typed(3, 4, 3), rgb_digits[:1])


def test_modes_of_the_encoder_are_left_alone():
    encoder = resnet20_cifar().train()
    encoder.layer1.eval()
    list_exits(encoder, IMAGES)
    assert encoder.training
    assert encoder.layer2.training
    assert not encoder.layer1.training


def test_wrappers_are_taken_off_and_scripted_modules_refused(digits):
    encoder = digits_encoder().eval()
    names = [point.name for point in list_exits(encoder, digits[:1])]
    for wrapped in (torch.compile(encoder), nn.DataParallel(encoder), torch.compile(nn.DataParallel(encoder))):
        assert as_module(wrapped) is encoder
        assert [point.name for point in list_exits(wrapped, digits[:1])] == names
    scripted = torch.jit.trace(encoder, digits[:1])
    with pytest.raises(InputError, match="pass the one it was made from"):
        list_exits(scripted, digits[:1])
    assert torch.equal(split(scripted, [], digits[:1])(digits[:3]), encoder(digits[:3]))  # behind a front


def test_the_backbone_of_a_lightning_module_is_the_encoder(rgb_digits):
    class SimCLR(pl.LightningModule):
        def __init__(self, **modules):
            super().__init__()
            for name, module in modules.items():
                self.add_module(name, module)

        def forward(self, images):
            return self.head(getattr(self, "backbone", None) or self.network)(images)

    backbone = untrained("resnet20", rgb_digits)
    expected = list_exits(backbone, rgb_digits[:1])
    assert list_exits(SimCLR(backbone=backbone, head=nn.Linear(64, 8)), rgb_digits[:1]) == expected
    whole = SimCLR(network=backbone)
    whole.forward = backbone.forward
    with pytest.warns(UserWarning, match="SimCLR has no `backbone` and is taken as the encoder"):
        graph.as_module(whole)
