"""Certificates over clients that are unlike each other."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom

from ssl_exit.exits.certificate import SettingCounts, certify
from ssl_exit.exits.mixture import client_passes, mixture_passes


def counts_of(n, wrong):
    """Counts of one client: n images of one cluster, of which so many disagree at each setting."""
    wrong = np.asarray(wrong, dtype=np.int64)
    left = np.full((len(wrong), 1, 1), n, dtype=np.int64)
    return SettingCounts(left, wrong[:, None, None], np.array([n]), wrong[:, None], np.maximum.accumulate(wrong))


def tail_of(shares, c):
    """P(X <= c) of a sum of Bernoulli variables with these probabilities, by convolution."""
    distribution = np.ones(1)
    for p in shares:
        distribution = np.convolve(distribution, [1 - p, p])
    return distribution[: c + 1].sum()


@given(st.lists(st.floats(0, 1), min_size=2, max_size=40))
def test_a_sum_of_unlike_images_has_the_lighter_lower_tail(shares):
    """Hoeffding 1956, theorem 4, which the certificate rests on."""
    n, mean = len(shares), float(np.mean(shares))
    for c in range(int(np.floor(n * mean - 1)) + 1):
        assert tail_of(shares, c) <= binom.cdf(c, n, mean) + 1e-12


def test_the_mixture_certifies_more_than_delta_only_as_often_as_allowed():
    rng, eps, delta, sizes = np.random.default_rng(0), 0.1, 0.1, [30, 60, 200]
    shares = np.array([0.5, 0.1, 0.0])
    shares *= 1.001 * eps * sum(sizes) / (np.array(sizes) @ shares)  # just more than eps disagree
    assert shares @ sizes / sum(sizes) > eps
    wrongly = 0
    for _ in range(2000):
        each = [counts_of(n, [0, rng.binomial(n, p)]) for n, p in zip(sizes, shares, strict=True)]
        wrongly += mixture_passes(each, eps, delta)[1]
    assert 0 < wrongly / 2000 <= delta + 3 * np.sqrt(delta * (1 - delta) / 2000)


def test_every_client_is_certified_at_once_only_as_often_as_allowed():
    rng, eps, delta, n = np.random.default_rng(1), 0.1, 0.2, 150
    wrongly = 0
    for _ in range(2000):
        each = [counts_of(n, [0, rng.binomial(n, p)]) for p in (0.0, 0.0, 1.001 * eps)]
        wrongly += client_passes(each, eps, delta)[1]
    assert 0 < wrongly / 2000 <= delta / 3 + 3 * np.sqrt(delta / 3 / 2000)  # union bound over three clients


numbers = st.lists(st.tuples(st.integers(1, 400), st.floats(0, 0.3)), min_size=3, max_size=6)


@given(numbers, st.integers(1, 2))
def test_leaving_out_those_that_disagree_least_is_stricter(clients, trim):
    each = [counts_of(n, np.round(np.linspace(0, share, 5) * n)) for n, share in clients]
    strict, plain = (mixture_passes(each, 0.05, 0.1, t) for t in (trim, 0))
    assert (strict <= plain).all()


def test_a_client_that_says_nothing_disagrees_does_not_certify_the_others():
    honest, liar = [counts_of(200, [0, 30]) for _ in range(3)], counts_of(10**6, [0, 0])
    assert mixture_passes([*honest, liar], 0.1, 0.05)[1]
    assert not mixture_passes([*honest, liar], 0.1, 0.05, trim=1)[1]
    empty, careful = counts_of(0, [0, 0]), counts_of(10**6, [0, 1])
    assert not mixture_passes([empty, *honest, liar], 0.1, 0.05, trim=1)[1]
    assert not mixture_passes([counts_of(20, [0, 0]), *honest, careful], 0.1, 0.05, trim=1)[1]


def test_the_certificate_says_over_whom():
    each = [counts_of(300, [0, 3]), counts_of(300, [0, 5])]
    path = np.array([[[np.inf]], [[0.5]]])
    for guarantee, passes, tests in (
        ("mixture", mixture_passes(each, 0.05, 0.05), 1),
        ("client", client_passes(each, 0.05, 0.05), 2),
    ):
        setting, certificate = certify(
            path, each[0] + each[1], np.array([0.3, 1.0]), 0.05, 0.95, guarantee, passes, tests
        )
        assert setting == 1
        assert certificate.disagreements == 8
        assert {"mixture": "over the images of all clients", "client": "at every client"}[guarantee] in str(certificate)


def test_why_not_every_client_is_certified():
    each = [counts_of(100, [0, 0]), counts_of(7, [0, 0])]
    path = np.array([[[np.inf]], [[0.5]]])
    passes = client_passes(each, 0.05, 0.05)
    _, certificate = certify(path, each[0] + each[1], np.array([0.3, 1.0]), 0.05, 0.95, "client", passes, 2)
    assert certificate.settings == 0
    assert "every client must certify it by itself, which takes 72 images or more" in str(certificate)
