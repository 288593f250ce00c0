"""The certificate: published check values, and a guarantee that holds when it is drawn again and again."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom

from ssl_exit.exits.certificate import (
    Certificate,
    SettingCounts,
    certify,
    close_thin_cells,
    fewest_images,
    fewest_on_average,
    most_disagreements,
    upper_bound,
)
from ssl_exit.exits.thresholds import NEVER, Recorded, simulate
from ssl_exit.settings.groups import from_json


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
    rounding = 1e-9
    assert k == -1 or binom.cdf(k, n, eps) <= (1 - confidence) * (1 + rounding)
    assert binom.cdf(k + 1, n, eps) > (1 - confidence) * (1 - rounding)


def test_clopper_pearson():
    assert upper_bound(0, 100, 0.95) == pytest.approx(1 - 0.05 ** (1 / 100))
    assert upper_bound(100, 100, 0.95) == 1
    bound = upper_bound(5, 100, 0.9)
    assert binom.cdf(5, 100, bound) == pytest.approx(0.1)


COSTS = np.array([0.25, 1.0])


def certified(path, data, costs, eps, confidence, guarantee="overall"):
    """The thresholds in use and their certificate, from recorded images."""
    setting, certificate = certify(path, SettingCounts.count(path, data), costs, eps, confidence, guarantee)
    return path[setting], certificate


def random_scores(rng, n):
    """One exit, one cluster on each side: an image disagrees with probability 1 - score."""
    scores = rng.uniform(0, 1, (n, 1)).astype(np.float32)
    wrong = rng.uniform(size=(n, 1)) > scores
    final = rng.integers(0, 2, n)
    return Recorded(np.where(wrong[:, 0], 1 - final, final)[:, None], scores, final)


def one_threshold(*values):
    """A path with the same threshold for both clusters, from never on."""
    return np.array([NEVER, *values])[:, None, None] * np.ones((1, 1, 2))


def test_walk_stops_at_the_first_setting_that_fails():
    data = random_scores(np.random.default_rng(0), 2000)
    path = one_threshold(*np.linspace(1, 0, 50), 0.99)
    thresholds, certificate = certified(path, data, COSTS, 0.05, 0.95)
    assert 0.6 < thresholds[0, 0] < 0.95  # not the 0.99 behind settings that failed
    leaving = data.scores[:, 0] >= thresholds[0, 0]
    disagree = data.labels[:, 0] != data.final
    assert certificate.disagreements == disagree[leaving].sum() <= most_disagreements(2000, 0.05, 0.95)
    assert certificate.early == pytest.approx(leaving.mean())
    assert certificate.cost == pytest.approx(1 - 0.75 * leaving.mean())
    assert certificate.disagreements / 2000 < certificate.bound <= 0.05 + 1e-9
    assert "disagreement <= 5.00% with confidence 95%" in str(certificate)
    without = max(i for i in range(51) if (disagree & (data.scores[:, 0] >= path[i, 0, 0])).mean() <= 0.05)
    assert certificate.cost_without == pytest.approx(1 - 0.75 * (data.scores[:, 0] >= path[without, 0, 0]).mean())
    assert certificate.cost_without < certificate.cost


@pytest.mark.parametrize("guarantee", ["overall", "cluster", "exit", "expectation"])
def test_too_few_images_certify_nothing_and_say_how_many_are_needed(guarantee):
    """One image fewer than are needed certifies nothing even if none disagrees; with that many it does."""
    eps, path = 0.02, one_threshold(0.5)
    for few in (True, False):
        needed = {"overall": 149, "cluster": 183, "exit": 183, "expectation": 49}[guarantee] - few
        data = random_scores(np.random.default_rng(0), 2 * needed if guarantee in ("cluster", "exit") else needed)
        final = np.arange(len(data)) % 2
        data = Recorded(final[:, None], np.ones_like(data.scores), final)
        thresholds, certificate = certified(path, data, COSTS, eps, 0.95, guarantee)
        assert certificate.settings == (not few)
        assert (thresholds == (NEVER if few else 0.5)).all()
        assert certificate.fewest == needed + few
    certificate = certified(path, random_scores(np.random.default_rng(0), 40), COSTS, eps, 0.95, guarantee)[1]
    assert f"at least {needed} are needed" in str(certificate)
    wrong = random_scores(np.random.default_rng(0), 2000)
    wrong.labels[:] = 1 - wrong.final[:, None]
    certificate = certified(path, Recorded(wrong.labels, np.ones_like(wrong.scores), wrong.final), COSTS, eps, 0.95)[1]
    assert certificate.settings == 0
    assert "even the surest setting" in str(certificate)


def true_risk(threshold):
    """The integral of 1 - score over [t, 1]."""
    return (1 - min(float(threshold), 1.0)) ** 2 / 2


def test_the_guarantee_holds_over_redraws():
    rng = np.random.default_rng(0)
    path = one_threshold(*np.linspace(1, 0, 200))
    eps, confidence, failures, draws = 0.05, 0.9, 0, 400
    for _ in range(draws):
        thresholds, _ = certified(path, random_scores(rng, 300), COSTS, eps, confidence)
        failures += true_risk(thresholds[0, 0]) > eps
    assert failures <= binom.ppf(0.999, draws, 1 - confidence)
    assert failures > 0  # and it is not vacuous


def test_risk_control_holds_on_average():
    rng = np.random.default_rng(0)
    path = one_threshold(*np.linspace(1, 0, 200))
    risks = [
        true_risk(certified(path, random_scores(rng, 200), COSTS, 0.05, 0.9, "expectation")[0][0, 0])
        for _ in range(400)
    ]
    assert 0.04 < np.mean(risks) <= 0.05 + 3 * np.std(risks) / 20
    assert (np.array(risks) > 0.05).mean() > 0.2  # single draws are not bounded


def two_kinds(rng, n):
    """As `random_scores`, but images of final cluster 1 disagree thrice as often, and are a third as many."""
    final = (rng.uniform(size=n) < 0.25).astype(np.int64)
    scores = rng.uniform(0, 1, (n, 1)).astype(np.float32)
    wrong = rng.uniform(size=n) < (1 - scores[:, 0]) * np.where(final, 1.0, 1 / 3)
    return Recorded(np.where(wrong, 1 - final, final)[:, None], scores, final)


@pytest.mark.slow
@pytest.mark.parametrize(("guarantee", "n"), [("cluster", 3000), ("exit", 10_000)])
def test_finer_guarantees_hold_for_every_part(guarantee, n):
    """Over redraws, in no part more than eps disagree; "overall" breaks that for the worse part nearly always."""
    rng = np.random.default_rng(0)
    path = one_threshold(*np.linspace(1, 0, 200))
    eps, confidence, draws = 0.05, 0.9, 100
    world = two_kinds(rng, 100_000)
    failures = {"overall": 0, guarantee: 0}
    for _ in range(draws):
        data, shaping = two_kinds(rng, n), two_kinds(rng, n // 3)
        for kind in failures:
            settings = close_thin_cells(path, shaping, n, eps, confidence) if kind == "exit" else path
            thresholds, certificate = certified(settings, data, COSTS, eps, confidence, kind)
            labels, exits = simulate(world, thresholds)
            parts = [world.final == c if guarantee == "cluster" else (exits == 0) & (labels == c) for c in (0, 1)]
            risks = [(labels != world.final)[at].mean() for at in parts if at.any()]
            failures[kind] += max(risks, default=0) > eps
    assert failures[guarantee] <= binom.ppf(0.999, draws, 1 - confidence)
    assert failures["overall"] > draws / 2
    assert certificate.early > 0
    assert 1 <= len(certificate.parts) <= certificate.tests <= 2
    for part in certificate.parts:
        assert part.disagreements / part.n < part.bound <= eps + 1e-9


def test_thin_cells_are_closed_and_the_rest_certified():
    """Label 1 is rare at the only exit: it can never be certified, and must not stop label 0."""
    rng = np.random.default_rng(0)
    n = 4000
    final = (rng.uniform(size=n) < 0.01).astype(np.int64)
    data = Recorded(final[:, None], np.full((n, 1), 0.9, dtype=np.float32), final)
    half = Recorded(data.labels[: n // 2], data.scores[: n // 2], final[: n // 2])
    path = one_threshold(0.5)
    assert certified(path, data, COSTS, 0.02, 0.95, "exit")[1].settings == 0
    closed = close_thin_cells(path, half, n, 0.02, 0.95)
    thresholds, certificate = certified(closed, data, COSTS, 0.02, 0.95, "exit")
    assert certificate.settings == 1
    assert thresholds[0].tolist() == [0.5, NEVER]
    assert [(part.exit, part.cluster) for part in certificate.parts] == [(0, 0)]


def test_to_json_and_back():
    data = two_kinds(np.random.default_rng(0), 3000)
    certificate = certified(one_threshold(0.99), data, COSTS, 0.1, 0.95, "cluster")[1]
    assert len(certificate.parts) == 2
    certificate = replace(certificate, issued_for={"encoder": "a", "exits": "b"})
    assert from_json(Certificate, json.loads(json.dumps(certificate.to_dict()))) == certificate


@given(eps=st.floats(0.001, 0.5))
def test_fewest_on_average(eps):
    n = fewest_on_average(eps)
    assert 1 / (n + 1) <= eps * (1 + 1e-12)
    assert n == 0 or 1 / n > eps
