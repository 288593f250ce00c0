"""Encoders by name and weights files."""

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from ssl_exit import EncoderSpec
from ssl_exit.encoders.resnet_cifar import resnet20_cifar
from ssl_exit.errors import InputError


def tiny() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))


def needs_arguments(width: int) -> nn.Module:
    return nn.Linear(width, width)


def not_a_module() -> int:
    return 3


@pytest.mark.parametrize(
    ("name", "features"),
    [("resnet18", 512), ("mobilenet_v3_small", 1024), ("vit_b_32", 768), ("swin_t", 768), ("timm:convnext_atto", 320)],
)
def test_classifiers_are_removed(name, features):
    with torch.no_grad():
        assert EncoderSpec(name).build()(torch.zeros(1, 3, 224, 224)).shape == (1, features)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".ckpt"])
def test_weights_with_a_classifier_fill_an_encoder_without(tmp_path, suffix):
    torch.manual_seed(3)
    whole = torchvision.models.resnet18().eval()
    file = tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        save_file(whole.state_dict(), file)
    else:
        torch.save({"state_dict": whole.state_dict()} if suffix == ".ckpt" else whole.state_dict(), file)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        features = EncoderSpec("resnet18", str(file)).build()(images)
        torch.testing.assert_close(whole.fc(features), whole(images))


def test_keys_and_shapes_that_do_not_fit_are_listed(tmp_path):
    state = resnet20_cifar().state_dict()
    state["extra.weight"] = torch.zeros(1)
    state["conv1.weight"] = torch.zeros(8, 3, 3, 3)
    del state["bn1.bias"]
    save_file(state, tmp_path / "w.safetensors")
    message = r"missing keys \['bn1.bias'\]; unexpected keys \['extra.weight'\]; shapes \['conv1.weight: \(8, 3, 3, 3\)"
    with pytest.raises(InputError, match=message):
        EncoderSpec("resnet20_cifar", str(tmp_path / "w.safetensors")).build()


def test_files_that_hold_no_weights_are_refused_and_run_nothing(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"a": Evil()}, tmp_path / "evil.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\x00")
    for name in ("evil.pt", "list.pt", "cut.safetensors", "absent.pt"):
        with pytest.raises(InputError, match=name):
            EncoderSpec("resnet20_cifar", str(tmp_path / name)).build()
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("name", "weights", "message"),
    [
        ("resnet99", None, "no encoder 'resnet99'"),
        ("timm:nothing", None, "timm has no model"),
        ("no.such.module:f", None, "cannot be built"),
        ("tests.encoders.test_build:absent", None, "cannot be built"),
        ("tests.encoders.test_build:needs_arguments", None, "called without arguments"),
        ("squeezenet1_0", None, "no linear classifier"),
        ("tests.encoders.test_build:not_a_module", None, "returned int"),
        ("resnet20_cifar", "DEFAULT", "no weights to download"),
        ("tests.encoders.test_build:tiny", "DEFAULT", "no weights to download"),
    ],
)
def test_names_that_mean_nothing_are_refused(name, weights, message):
    with pytest.raises(InputError, match=message):
        EncoderSpec(name, weights).build()


def test_a_function_of_ones_own():
    assert len(EncoderSpec("tests.encoders.test_build:tiny").build()) == 3
