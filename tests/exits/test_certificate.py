"""The certificate: published check values, and a guarantee that holds when it is drawn again and again."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom

from ssl_exit.exits.certificate import certify, fewest_images, most_disagreements, upper_bound
from ssl_exit.exits.thresholds import NEVER, Recorded


@pytest.mark.parametrize(
    ("eps", "allowed", "fewest"), [(0.01, (4, 38, 83), 299), (0.02, (12, 83, 176), 149), (0.05, (38, 224, 463), 59)]
)
def test_check_values(eps, allowed, fewest):
    assert tuple(most_disagreements(n, eps, 0.95) for n in (1000, 5000, 10000)) == allowed
    assert fewest_images(eps, 0.95) == fewest
    assert most_disagreements(fewest, eps, 0.95) == 0
    assert most_disagreements(fewest - 1, eps, 0.95) == -1


@given(n=st.integers(1, 500), eps=st.floats(0.005, 0.5), confidence=st.floats(0.5, 0.99))
def test_one_more_disagreement_would_be_too_many(n, eps, confidence):
    k = most_disagreements(n, eps, confidence)
    assert k == -1 or binom.cdf(k, n, eps) <= 1 - confidence
    assert binom.cdf(k + 1, n, eps) > 1 - confidence


def test_clopper_pearson():
    assert upper_bound(0, 100, 0.95) == pytest.approx(1 - 0.05 ** (1 / 100))
    assert upper_bound(100, 100, 0.95) == 1
    bound = upper_bound(5, 100, 0.9)
    assert binom.cdf(5, 100, bound) == pytest.approx(0.1)


def random_scores(rng, n):
    """One exit, one cluster on each side: an image disagrees with probability 1 - score."""
    scores = rng.uniform(0, 1, (n, 1)).astype(np.float32)
    wrong = rng.uniform(size=(n, 1)) > scores
    return Recorded(wrong.astype(np.int64), scores, np.zeros(n, dtype=np.int64))


def test_walk_stops_at_the_first_setting_that_fails():
    data = random_scores(np.random.default_rng(0), 2000)
    path = np.concatenate([[NEVER], np.linspace(1, 0, 50), [0.99]])[:, None, None] * np.ones((1, 1, 2))
    thresholds, certificate = certify(path, data, 0.05, 0.95)
    assert 0.6 < thresholds[0, 0] < 0.95  # not the 0.99 behind settings that failed
    leaving = data.scores[:, 0] >= thresholds[0, 0]
    assert certificate.disagreements == data.labels[leaving].sum() <= most_disagreements(2000, 0.05, 0.95)
    assert certificate.early == pytest.approx(leaving.mean())
    assert certificate.disagreements / 2000 < certificate.bound <= 0.05 + 1e-9
    assert "disagreement <= 5.00% with confidence 95%" in str(certificate)


def test_too_few_images_certify_nothing_and_say_how_many_are_needed():
    path = np.array([NEVER, 0.9])[:, None, None] * np.ones((1, 1, 2))
    thresholds, certificate = certify(path, random_scores(np.random.default_rng(0), 100), 0.02, 0.95)
    assert (thresholds == NEVER).all()
    assert certificate.settings == 0
    assert "at least 149" in str(certificate)
    wrong = random_scores(np.random.default_rng(0), 2000)
    wrong.labels[:] = 1
    _, certificate = certify(path, wrong, 0.02, 0.95)
    assert certificate.settings == 0
    assert "even the surest setting" in str(certificate)


def test_the_guarantee_holds_over_redraws():
    rng = np.random.default_rng(0)
    path = np.concatenate([[NEVER], np.linspace(1, 0, 200)])[:, None, None] * np.ones((1, 1, 2))
    eps, confidence, failures, draws = 0.05, 0.9, 0, 400
    for _ in range(draws):
        thresholds, _ = certify(path, random_scores(rng, 300), eps, confidence)
        t = min(float(thresholds[0, 0]), 1.0)
        failures += (1 - t) ** 2 / 2 > eps  # true risk: the integral of 1 - score over [t, 1]
    assert failures <= binom.ppf(0.999, draws, 1 - confidence)
    assert failures > 0  # and it is not vacuous
