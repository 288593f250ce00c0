"""Thresholds: simulation against a loop, and the path from never to always."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssl_exit.exits.thresholds import (
    NEVER,
    Recorded,
    _best_cut,
    foretold_agreement,
    simulate,
    threshold_path,
    trade_off,
)


def recorded(n, e, k, seed, calibrated=False):
    """Random scores; calibrated ones foretell how often a label is right."""
    rng = np.random.default_rng(seed)
    final = rng.integers(0, k, n)
    scores = rng.uniform(1 / k, 1, (n, e)).astype(np.float32)
    if calibrated:
        right = rng.uniform(size=(n, e)) < scores
        labels = np.where(right, final[:, None], (final[:, None] + rng.integers(1, k, (n, e))) % k)
    else:
        labels = rng.integers(0, k, (n, e))
    return Recorded(labels, scores, final)


@given(n=st.integers(0, 20), e=st.integers(1, 4), k=st.integers(1, 4), seed=st.integers(0, 999))
def test_simulation_equals_a_loop(n, e, k, seed):
    data = recorded(n, e, k, seed)
    rng = np.random.default_rng(seed + 1)
    data.scores[rng.uniform(size=(n, e)) < 0.1] = np.nan
    thresholds = rng.choice([0.0, 0.3, 0.7, NEVER], (e, k))
    labels, exits = simulate(data, thresholds)
    for i in range(n):
        for exit_ in range(e):
            if data.scores[i, exit_] >= thresholds[exit_, data.labels[i, exit_]]:
                assert (labels[i], exits[i]) == (data.labels[i, exit_], exit_)
                break
        else:
            assert (labels[i], exits[i]) == (data.final[i], e)


def test_path_runs_from_never_to_always_and_gets_cheaper():
    data, unseen = recorded(1500, 3, 4, 0, calibrated=True), recorded(1500, 3, 4, 1, calibrated=True)
    costs = np.array([0.2, 0.5, 0.8, 1.0])
    path = threshold_path(data, costs, 4)
    assert path.dtype == np.float32
    assert (path[0] == NEVER).all()
    assert (path[-1] == 0).all()
    cost, agreement = trade_off(path, unseen, costs)
    assert (cost[0], agreement[0]) == (1, 1)
    assert cost[-1] == pytest.approx(0.2)
    assert (np.diff(cost) < 0.02).all()
    assert (np.diff(cost) > -0.2).all()  # no leap over the useful settings but the last, to "always"
    assert np.abs(np.diff(agreement)).max() < 0.2


def test_path_beats_a_single_threshold_where_one_exit_is_worse():
    rng = np.random.default_rng(0)
    n, k = 6000, 3
    final = rng.integers(0, k, n)
    scores = rng.uniform(0.4, 1, (n, 2)).astype(np.float32)
    right = rng.uniform(size=(n, 2)) < np.column_stack([scores[:, 0] ** 6, scores[:, 1] ** 0.2])
    labels = np.where(right, final[:, None], (final[:, None] + 1) % k)
    halves = [Recorded(labels[s], scores[s], final[s]) for s in (slice(0, n // 2), slice(n // 2, n))]
    costs = np.array([0.3, 0.6, 1.0])

    def cheapest(path):
        cost, agreement = trade_off(path, halves[1], costs)
        return cost[agreement >= 0.95].min()

    single = np.linspace(1, 0.4, 100)[:, None, None] * np.ones((1, 2, k))
    assert cheapest(threshold_path(halves[0], costs, k)) < cheapest(single) - 0.01


@settings(max_examples=50)
@given(st.lists(st.tuples(st.sampled_from([0.1, 0.4, 0.4, 0.7, 0.9]), st.integers(-5, 5)), min_size=1, max_size=12))
def test_best_cut_equals_trying_every_threshold(pairs):
    pairs = sorted(pairs, reverse=True)
    scores, gain = np.array([s for s, _ in pairs]), np.array([float(g) for _, g in pairs])
    cut = _best_cut(scores, gain)
    best = max([0.0, *(gain[scores >= t].sum() for t in scores)])
    assert gain[scores >= cut].sum() == best


def test_no_images_no_exits():
    empty = Recorded(np.zeros((0, 2), dtype=np.int64), np.zeros((0, 2), dtype=np.float32), np.zeros(0, dtype=np.int64))
    path = threshold_path(empty, np.array([0.3, 0.6, 1.0]), 4)
    assert (path[0] == NEVER).all()


def test_foretold_agreement_rises_with_the_score_and_is_calibrated():
    data = recorded(5000, 2, 4, 0, calibrated=True)
    data.scores[:10, 0] = np.nan
    squeezed = Recorded(data.labels, data.scores * 0.01, data.final)  # any scale
    for one in (data, squeezed):
        p = foretold_agreement(one)
        assert (p[:10, 0] == 0).all()
        order = np.argsort(one.scores[10:, 0])
        assert (np.diff(p[10:, 0][order]) >= 0).all()
        agrees = one.labels[:, 1] == one.final
        for low, high in ((0.3, 0.6), (0.6, 0.8), (0.8, 1.0)):
            inside = (p[:, 1] >= low) & (p[:, 1] < high)
            assert agrees[inside].mean() == pytest.approx(p[inside, 1].mean(), abs=0.05)


def test_foretold_agreement_where_nothing_can_be_learnt():
    final = np.zeros(6, dtype=np.int64)
    always = Recorded(final[:, None], np.linspace(0.1, 0.9, 6)[:, None], final)
    np.testing.assert_array_equal(foretold_agreement(always), 1)
    constant = Recorded(np.array([0, 0, 0, 1, 1, 1])[:, None], np.full((6, 1), 0.5), final)
    np.testing.assert_allclose(foretold_agreement(constant), 0.5)
    falling = Recorded(np.array([0, 0, 0, 1, 1, 1])[:, None], np.linspace(0.1, 0.9, 6)[:, None], final)
    np.testing.assert_allclose(foretold_agreement(falling), 0.5)


def test_one_threshold_an_exit():
    data = recorded(800, 3, 4, 0, calibrated=True)
    path = threshold_path(data, np.array([0.2, 0.5, 0.8, 1.0]), 4, per_cluster=False, steps=8, between=3)
    assert (path == path[:, :, :1]).all()
    assert len(np.unique(path[10])) > 1  # but exits differ
