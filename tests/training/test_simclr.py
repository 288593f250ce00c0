"""Training without labels makes clusters better, is reproducible, and refuses what cannot work."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier

from ssl_exit.demo import augment_digits, digits_encoder
from ssl_exit.encoders.tapped import TappedEncoder
from ssl_exit.errors import InputError
from ssl_exit.training.simclr import seeded, train_simclr


def build(images, seed=0):
    with seeded(seed):
        encoder = digits_encoder()
    return encoder, TappedEncoder.build(encoder, "auto", images[:1])


def knn(encoder, images):
    targets = load_digits().target
    with torch.no_grad():
        features = torch.nn.functional.normalize(encoder.eval()(images)).numpy()
    return KNeighborsClassifier(5).fit(features[:900], targets[:900]).score(features[900:], targets[900:])


@pytest.mark.parametrize("exit_weight", [0.0, 1.0])
def test_training_makes_neighbours_of_one_class(digits, exit_weight):
    encoder, tapped = build(digits)
    before = knn(encoder, digits)
    train_simclr(
        tapped, digits[:900], augment_digits, epochs=12, batch_size=128, exit_weight=exit_weight, progress=False
    )
    assert knn(encoder, digits) > before + 0.015
    assert not tapped.training


def test_training_is_reproducible_and_leaves_the_global_generator_alone(digits):
    weights = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        state = torch.get_rng_state()
        encoder, tapped = build(digits)
        train_simclr(tapped, digits[:256], augment_digits, epochs=1, batch_size=64, seed=5, progress=False)
        assert torch.equal(torch.get_rng_state(), state)
        weights.append(encoder.block8.conv.weight)
    assert torch.equal(*weights)


def test_views_differ_from_each_other_and_keep_their_shape(digits):
    with seeded(0):
        one, two = augment_digits(digits[:8]), augment_digits(digits[:8])
    assert one.shape == digits[:8].shape
    assert (one - two).abs().mean() > 0.05
    assert np.corrcoef(one.flatten(), digits[:8].flatten())[0, 1] > 0.3


def test_too_few_images_and_a_broken_loss_are_errors(digits):
    _, tapped = build(digits)
    with pytest.raises(InputError, match="do not fill one batch"):
        train_simclr(tapped, digits[:10], augment_digits, epochs=1, batch_size=64, progress=False)
    with pytest.raises(InputError, match="at step 0"):
        train_simclr(tapped, digits[:64] * torch.nan, augment_digits, epochs=1, batch_size=64, progress=False)
