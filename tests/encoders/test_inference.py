"""Copies for inference compute what the encoder computes."""

import copy

import pytest
import torch
from torch import nn

from ssl_exit.encoders.descriptors import Descriptor
from ssl_exit.encoders.inference import for_inference
from ssl_exit.encoders.stages import split
from ssl_exit.encoders.tapped import TappedEncoder
from ssl_exit.errors import InputError
from tests.conftest import untrained


@pytest.mark.parametrize("name", ["resnet20", "mobilenet", "vit"])
def test_the_copy_equals_the_encoder_and_leaves_it_as_it_was(name, rgb_digits):
    encoder = untrained(name, rgb_digits)
    before = copy.deepcopy(encoder.state_dict())
    tapped = TappedEncoder.build(encoder, "auto", rgb_digits[:1])
    fast, half = (tapped.for_inference(p, (3, 32, 32)) for p in ("float32", "bfloat16"))
    with torch.no_grad():
        expected = encoder(rgb_digits[:50])
        with torch.autocast("cpu", torch.bfloat16):
            rounding = (encoder(rgb_digits[:50]) - expected).norm()
        for copied, within in ((fast, 1e-4 * expected.norm()), (half, 1.5 * rounding)):
            features = copied.final_features(copied.enter(rgb_digits[:50]))
            assert features.dtype == torch.float32
            assert not any(tensor.is_inference() for tensor in copied.state_dict().values())  # CUDA runs none such
            assert (features - expected).norm() <= within
    assert all(torch.equal(value, before[key]) for key, value in encoder.state_dict().items())
    norms = [m for m in fast.modules() if isinstance(m, nn.BatchNorm2d)]
    if name != "vit":
        assert norms == []  # all of them stand behind a convolution
        assert any(isinstance(m, nn.BatchNorm2d) for m in tapped.modules())


class Shared(nn.Module):
    """One convolution used twice, a norm behind a sum, and a convolution with two readers: none may be folded."""

    def __init__(self):
        super().__init__()
        self.twice, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.once, self.read = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.behind, self.folded = nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4)

    def forward(self, x):
        x = self.norm(self.twice(self.twice(x)))
        y = self.once(x)
        x = self.read(y) + y
        return self.folded(self.behind(x)).mean((2, 3))


def test_only_what_nothing_else_uses_is_folded():
    torch.manual_seed(0)
    encoder = Shared()
    images = torch.randn(20, 3, 8, 8)
    encoder(images)  # statistics that are not those of a new norm
    encoder.eval()
    (stage,) = split(encoder, [], images).stages
    fast = for_inference(stage, torch.float32, rewrite=True)
    torch.testing.assert_close(fast(images), encoder(images), rtol=1e-4, atol=1e-5)
    assert [name for name, m in fast.named_modules() if isinstance(m, nn.BatchNorm2d)] == ["norm", "read"]
    assert all(
        m.weight.dtype == torch.float32
        for m in for_inference(stage, torch.bfloat16, rewrite=True).modules()
        if hasattr(m, "eps")
    )


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.convolution, self.first, self.second = nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.BatchNorm2d(5)

    def forward(self, x):
        return self.second(self.first(self.convolution(x))).mean((2, 3))


class Viewed(nn.Module):
    """Flattened by strides, as in many a tutorial."""

    def __init__(self):
        super().__init__()
        self.convolution, self.norm, self.linear = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4 * 36, 5)

    def forward(self, x):
        x = self.norm(self.convolution(x)).relu()
        return self.linear(x.view(x.size(0), -1))


class Indexed(nn.Module):
    """Reads what its sequence computes in between."""

    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(3, 5, 1), nn.BatchNorm2d(5), nn.ReLU())

    def forward(self, x):
        return (self.block[0](x) + self.block(x)).mean((2, 3))


def joined(encoder, images):
    """Without exits."""
    return TappedEncoder(split(encoder, [], images), [], Descriptor("average", (5,), "vector"), False)


@pytest.mark.parametrize("kind", [Twice, Viewed, Indexed])
def test_unusual_encoders_compute_what_they_did(kind):
    torch.manual_seed(0)
    encoder, images = kind(), torch.randn(20, 3, 8, 8) + 1
    for _ in range(20):
        encoder(images)
    encoder.eval()
    copied = joined([encoder] if kind is Indexed else encoder, images).for_inference("float32", (3, 8, 8))
    with torch.no_grad():
        torch.testing.assert_close(copied.final_features(copied.enter(images)), encoder(images), rtol=1e-4, atol=1e-5)


class Wide(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 5)

    def forward(self, x):
        return self.linear(x.float().mean((2, 3)))


def test_an_encoder_that_cannot_run_in_bfloat16_is_an_error(rgb_digits):
    with pytest.raises(InputError, match=r"does not run in bfloat16 .*use float32"):
        joined(Wide(), rgb_digits[:2]).for_inference("bfloat16", (3, 32, 32))
