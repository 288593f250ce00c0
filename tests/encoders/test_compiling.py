"""Compiled passes: the same descriptors, features and gradients, and as before where nothing can be compiled."""

import copy

import pytest
import torch
from torch import nn

from ssl_exit.encoders.compiling import compiled
from ssl_exit.encoders.tapped import TappedEncoder

CPU = torch.device("cpu")


@pytest.fixture
def tapped():
    torch.manual_seed(0)
    stages = [nn.Sequential(nn.Conv2d(c, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU()) for c in (1, 4, 4)]
    return TappedEncoder.build(
        nn.Sequential(*stages, nn.AdaptiveAvgPool2d(1), nn.Flatten()), "auto", torch.zeros(1, 1, 8, 8)
    )


def gradients(tapped, images):
    tapped.zero_grad()
    described, features = tapped(images)
    (described.square().sum() + features.sum()).backward()
    return [p.grad.clone() for p in tapped.parameters()]


@pytest.mark.slow
def test_compiled_passes_equal_plain_ones(tapped, digits):
    images, twin = digits[:32], copy.deepcopy(tapped)
    expected = [*tapped(images), tapped.final_features(images), *gradients(tapped, images)]
    names = list(tapped.state_dict())
    with compiled([twin], CPU):
        assert "forward" in vars(twin)
        found = [*twin(images), twin.final_features(images), *gradients(twin, images)]
        assert list(twin.state_dict()) == names
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-3)
    assert "forward" not in vars(twin)
    assert "final_features" not in vars(twin)


def test_without_a_compiler_passes_run_as_before(tapped, digits, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no C++ compiler\nof any kind")

    monkeypatch.setattr(torch, "compile", broken)
    expected = tapped(digits[:4])
    with (
        pytest.warns(UserWarning, match=r"does not work here \(no C\+\+ compiler\); going on without it"),
        compiled([tapped], CPU),
    ):
        found = tapped(digits[:4])
    assert torch.equal(expected[1], found[1])
