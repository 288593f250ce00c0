"""Class based thresholds by hand, and the path they are swept along."""

import numpy as np
import pytest

from ssl_exit.exits.cbt import cbt_path, cbt_thresholds
from ssl_exit.exits.thresholds import trade_off
from tests.exits.test_thresholds import recorded


def test_thresholds_by_hand():
    mean = np.array([[0.9, 0.05, 0.05], [0.2, 0.6, 0.2], [0.3, 0.3, 0.4]])  # gaps 0.85, 0.4, 0.1
    found = cbt_thresholds(mean, 0.5, 0.8)
    np.testing.assert_allclose(found, [0.5, 0.8 - 0.3 * 0.3 / 0.75, 0.8])
    np.testing.assert_allclose(cbt_thresholds(np.full((3, 3), 1 / 3), 0.5, 0.8), 0.8)
    np.testing.assert_allclose(cbt_thresholds(np.ones((1, 1)), 0.5, 0.8), 0.8)


def test_path_runs_from_never_to_always_with_one_threshold_a_cluster():
    data, costs = recorded(1000, 3, 4, 0, calibrated=True), np.array([0.2, 0.5, 0.8, 1.0])
    means = np.eye(4) * np.array([0.6, 0.5, 0.4, 0.3])[:, None] + 0.1
    path = cbt_path(data, costs, np.stack([means] * 3))
    assert (path == path[:, :1]).all()  # the same for all exits
    cost, agreement = trade_off(path, data, costs)
    assert (cost[0], agreement[0]) == (1, 1)
    assert cost[-1] == pytest.approx(0.2)
    inner = path[1:-1, 0]
    assert (np.diff(inner, axis=1) >= 0).all()  # easier clusters, lower thresholds
    assert (np.diff(inner, axis=0) <= 0).all()


def test_clusters_that_are_easier_get_lower_thresholds_where_that_pays():
    rng = np.random.default_rng(0)
    n, k = 8000, 2
    final = rng.integers(0, k, n)
    data = recorded(n, 1, k, 0, calibrated=True)
    right = rng.uniform(size=(n, 1)) < np.where(final[:, None] == 0, data.scores**0.1, data.scores**4)
    data = type(data)(np.where(right, final[:, None], 1 - final[:, None]), data.scores, final)
    p = np.stack([[data.scores[final == c].mean(), 1 - data.scores[final == c].mean()] for c in range(k)])
    p[1] = [0.5, 0.5]
    path = cbt_path(data, np.array([0.3, 1.0]), p[None])
    assert (path[1:-1, 0, 0] <= path[1:-1, 0, 1]).all()
