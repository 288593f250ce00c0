"""No certificate for an encoder whose features of an image depend on more than the image; and outputs that are none."""

import pytest
import torch
from torch import nn

from ssl_exit import ExitClusterer, InputError
from ssl_exit.encoders.small import digits_encoder
from tests.conftest import clusterer


class Wrapped(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.encoder, self.function, self.calls = digits_encoder(), function, 0

    def forward(self, x):
        self.calls += 1
        return self.function(self, self.encoder(x).flatten(1))


class Stubborn(nn.Dropout):
    """A dropout that eval() does not reach."""

    @property
    def training(self):
        return True

    @training.setter
    def training(self, mode):
        pass


REFUSED = [
    (Wrapped(lambda _, z: nn.functional.dropout(z, 0.5)), "same batch runs twice.*dropout that does not follow"),
    (nn.Sequential(digits_encoder(), Stubborn(0.5)), "same batch runs twice.*1' is in training mode"),
    (Wrapped(lambda _, z: z + torch.rand_like(z)), "same batch runs twice"),
    (Wrapped(lambda m, z: z + m.calls), "same batch runs twice"),
    (Wrapped(lambda _, z: (z - z.mean(0)) / (z.std(0) + 1e-3)), "alone and in a batch"),
    (Wrapped(lambda _, z: z * torch.arange(1, 1 + len(z))[:, None].clamp(min=9)), "in another order"),
    (
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.ReLU(), nn.Conv2d(4, 4, 3)),
        "1' is a batch normalisation without running statistics",
    ),
]


@pytest.mark.parametrize(("encoder", "message"), REFUSED)
@pytest.mark.filterwarnings("ignore:std")
def test_an_encoder_that_does_not_answer_the_same_twice_is_refused(encoder, message, digits):
    with pytest.raises(InputError, match=message):
        ExitClusterer([encoder.eval(), nn.Identity()], exits=["stage0"]).fit(digits[:300])


@pytest.mark.parametrize(("encoder", "message"), [REFUSED[i] for i in (0, 2, 6)])
def test_it_is_refused_before_a_front_is_taught(encoder, message, digits):
    with pytest.raises(InputError, match=message):
        ExitClusterer(encoder.eval(), front="auto").fit(digits[:300])


def test_one_whose_state_tracing_would_freeze_is_refused(digits):
    encoder = Wrapped(lambda m, z: z if m.calls % 2 else -z).eval()
    for how in ({"front": "auto"}, {"exits": ["encoder.block3.relu"]}):
        with pytest.raises(InputError, match=r"as it is.* cut into stages"):
            ExitClusterer(encoder, **how).fit(digits[:300])


def test_one_that_does_passes_in_both_precisions(digits):
    for precision in ("float32", "bfloat16"):
        clusterer(digits_encoder(), precision=precision, confidence=0.5, max_disagreement=0.2).fit(digits[:600])


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (lambda x: x.flatten(1)[:, :0], r"shape \(1, 0\)"),
        (lambda x: torch.cat([x, x]).flatten(1), r"shape \(2, 64\)"),
        (lambda x: x.flatten(1).to("meta"), "a meta tensor"),
        (lambda x: x.flatten(1).to_sparse(), "a sparse_coo tensor"),
        (lambda x: x.flatten(1).int(), "dtype torch.int32"),
        (lambda x: x.flatten(), "shape"),
        (lambda x: x.sum(), "shape"),
    ],
)
@pytest.mark.parametrize("front", [None, "auto"])
def test_what_is_no_row_of_features_an_image_is_refused(output, message, front, digits):
    class Odd(nn.Module):
        def forward(self, x):
            return output(x)

    encoder = [nn.Conv2d(1, 1, 1), Odd()] if front is None else Odd()
    with pytest.raises(InputError, match=message if front is None else "feature|images"):
        ExitClusterer(encoder, exits=["stage0"] if front is None else "auto", front=front).fit(digits[:300])
