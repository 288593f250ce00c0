"""Descriptors against slow references."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ssl_exit.encoders.descriptors import Descriptor, layout_of, pyramid, tokens
from ssl_exit.encoders.tapped import TappedEncoder
from ssl_exit.errors import InputError
from tests.conftest import tensors_of, untrained


@given(h=st.integers(1, 9), w=st.integers(1, 9), last=st.booleans(), seed=st.integers(0, 99))
def test_pyramid_equals_pooling_standard_deviation_and_maximum(h, w, last, seed):
    x = torch.randn(3, 4, h, w, generator=torch.Generator().manual_seed(seed)) + 1
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    quarters, std, most = pyramid(x).split([16, 4, 4], dim=1)
    torch.testing.assert_close(quarters, F.adaptive_avg_pool2d(x, 2).flatten(1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(std, x.std((2, 3), correction=0), rtol=1e-4, atol=3e-3)
    torch.testing.assert_close(most, F.adaptive_max_pool2d(x, 1).flatten(1))


@pytest.mark.parametrize(
    ("size", "steps"), [((70, 33), (3, 2)), ((64, 20), (2, 1)), ((33, 32), (2, 1)), ((112, 112), (4, 4))]
)
def test_pyramid_of_a_large_map_is_that_of_its_local_averages(size, steps):
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    (h, w), (a, b) = size, steps
    rows = [[x[:, :, i : i + a, j : j + b].mean((2, 3)) for j in range(0, w, b)] for i in range(0, h, a)]
    coarse = torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)
    assert max(coarse.shape[2:]) <= 32
    torch.testing.assert_close(pyramid(x), pyramid(coarse))


def test_standard_deviation_is_exact_where_it_matters_and_its_slope_is_finite():
    x = (torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)) + 2).requires_grad_()
    std = pyramid(x)[:, 12:15]
    torch.testing.assert_close(std, x.std((2, 3), correction=0), rtol=1e-5, atol=0)
    constant = torch.zeros(1, 3, 8, 8, requires_grad=True)
    pyramid(constant)[:, 12:15].sum().backward()
    assert constant.grad.isfinite().all()


@pytest.mark.parametrize("size", [(32, 32), (7, 5)])
def test_half_precision_is_exact_to_its_digits(size):
    """Sums are taken in float32 and rounded to 8 bits at the end."""
    x = torch.randn(4, 3, *size, generator=torch.Generator().manual_seed(0)) + 2
    torch.testing.assert_close(pyramid(x.bfloat16()).float(), pyramid(x), rtol=2e-2, atol=2e-2)


def test_tokens_by_hand():
    x = torch.tensor([[[1.0, 0.0], [3.0, 0.0], [5.0, 6.0]]])
    expected = [1.0, 0.0, 3.0, 2.0, (8 / 3) ** 0.5, 8**0.5]
    torch.testing.assert_close(tokens(x), torch.tensor([expected]))


@pytest.mark.parametrize(
    ("shape", "image", "layout"),
    [
        ((64, 8, 8), (32, 32), "map"),
        ((8, 8, 64), (32, 32), "map_channels_last"),
        ((8, 8, 8), (32, 32), "map"),
        ((64, 8, 16), (32, 64), "map"),
        ((8, 16, 64), (32, 64), "map_channels_last"),
        ((50, 32), (32, 32), "tokens"),
        ((64,), (32, 32), "vector"),
    ],
)
def test_layouts(shape, image, layout):
    assert layout_of(shape, image) == layout


def test_channels_last_maps_give_the_same_descriptor():
    x = torch.randn(2, 5, 4, 4)
    first = Descriptor("pyramid", (5, 4, 4), "map")
    last = Descriptor("pyramid", (4, 4, 5), "map_channels_last")
    torch.testing.assert_close(first(x), last(x.permute(0, 2, 3, 1)))
    assert first.dim == last.dim == first(x).shape[1] == 30
    assert first.macs == last.macs == 3 * 5 * 16


def test_flattened_maps_are_all_their_entries():
    x = torch.randn(2, 5, 4, 4)
    flat = Descriptor("flatten", (5, 4, 4), "map")
    assert torch.equal(flat(x), x.reshape(2, 80))
    assert (flat.dim, flat.macs) == (80, 0)


def test_vectors_pass_and_normalising_gives_unit_length():
    x = torch.randn(3, 7)
    assert torch.equal(Descriptor("pyramid", (7,), "vector")(x), x)
    normalised = Descriptor("average", (7, 4, 4), "map", normalize=True)(torch.randn(3, 7, 4, 4))
    torch.testing.assert_close(normalised.norm(dim=1), torch.ones(3))


@pytest.mark.parametrize(
    ("kind", "shape", "layout", "message"),
    [
        ("median", (4, 2, 2), "map", "'median' does not exist"),
        ("pyramid", (5, 4), "tokens", r"choose one of \['average', 'flatten', 'tokens'\]"),
        ("tokens", (4, 2, 2), "map", r"choose one of \['average', 'flatten', 'pyramid'\]"),
    ],
)
def test_descriptors_that_do_not_fit_are_refused(kind, shape, layout, message):
    with pytest.raises(InputError, match=message):
        Descriptor(kind, shape, layout)


def test_tensors_of_other_ranks_are_refused():
    with pytest.raises(InputError, match="no descriptor fits"):
        layout_of((2, 3, 4, 5), (32, 32))


def test_a_descriptor_is_taken_before_the_next_stage_changes_its_tensor(rgb_digits):
    layers = torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(inplace=True), torch.nn.Conv2d(8, 8, 3)
    tapped = TappedEncoder.build(torch.nn.Sequential(*layers), ["0"], rgb_digits[:1], descriptor="average").eval()
    with torch.no_grad():
        described, _ = tapped(rgb_digits[:4])
        torch.testing.assert_close(described, layers[0](rgb_digits[:4]).mean((2, 3)))


@pytest.mark.parametrize(
    ("layers", "exits", "descriptor"),
    [
        ((nn.Flatten(), nn.Linear(192, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), ["1", "3"], "auto"),
        ((nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)), ["0", "2"], "flatten"),
        (
            (nn.Flatten(2), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)),
            ["1", "3"],
            "flatten",
        ),
    ],
)
def test_descriptors_that_are_the_tensor_itself_are_kept_from_the_next_stage(layers, exits, descriptor):
    """Vectors and whole maps: what fit() and record() see is what a segment sees, and what is there."""
    x, expected, y = torch.randn(5, 3, 8, 8), [], None
    with torch.no_grad():
        for i, layer in enumerate(layers):
            y = layer(x if y is None else y)
            expected += [y.flatten(1)] * (str(i) in exits)
            if isinstance(layer, nn.ReLU):
                layer.inplace = True
        tapped = TappedEncoder.build(nn.Sequential(*layers), exits, x[:1], descriptor=descriptor).eval()
        torch.testing.assert_close(tapped(x)[0], torch.cat(expected, dim=1))


def test_accumulated_and_single_columns(rgb_digits):
    encoder = untrained("resnet20", rgb_digits)
    build = {"exits": ["layer1", "layer2"], "example": rgb_digits[:1], "descriptor": "average"}
    together = TappedEncoder.build(encoder, **build).eval()
    alone = TappedEncoder.build(encoder, **build, accumulate=False).eval()
    with torch.no_grad():
        described, features = together(rgb_digits[:3])
        maps = [t.mean((2, 3)) for t in tensors_of(together.staged, rgb_digits[:3])[:2]]
        torch.testing.assert_close(described, torch.cat(maps, 1))
        torch.testing.assert_close(features, encoder(rgb_digits[:3]))
    assert together.columns == [slice(0, 16), slice(0, 48)]
    assert alone.columns == [slice(0, 16), slice(16, 48)]


def test_auto_falls_back_to_the_average_and_to_single_descriptors_where_they_are_wide(rgb_digits):
    wide = torch.nn.Sequential(*(torch.nn.Conv2d(i, o, 1) for i, o in ((3, 600), (600, 600), (600, 600), (600, 9))))
    tapped = TappedEncoder.build(wide, ["0", "1", "2"], rgb_digits[:1, :, :4, :4])
    assert {d.kind for d in tapped.descriptors} == {"average"}
    assert tapped.accumulate
    wider = torch.nn.Sequential(*(torch.nn.Conv2d(i, o, 1) for i, o in ((3, 2500), (2500, 2500), (2500, 2500))))
    tapped = TappedEncoder.build(wider, ["0", "1"], rgb_digits[:1, :, :4, :4])
    assert not tapped.accumulate
    assert tapped.seen == [2500, 2500]
