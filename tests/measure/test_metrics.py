"""Metrics by hand and against brute force."""

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssl_exit.measure.metrics import against_targets, agreement, clustering_accuracy


@given(n=st.integers(1, 30), k=st.integers(1, 4), seed=st.integers(0, 99))
def test_accuracy_is_the_best_over_all_renamings(n, k, seed):
    rng = np.random.default_rng(seed)
    labels, targets = rng.integers(0, k, n), rng.integers(0, k, n)
    best = max((np.array(p)[labels] == targets).mean() for p in permutations(range(k)))
    assert clustering_accuracy(labels, targets) == pytest.approx(best)


def test_more_clusters_than_classes():
    assert clustering_accuracy(np.array([0, 1, 2, 2]), np.array([5, 5, 7, 7])) == 0.75


def test_perfect_and_agreement():
    labels = np.array([2, 2, 0, 1])
    assert against_targets(labels, np.array([0, 0, 1, 2])) == {"acc": 1, "nmi": 1, "ari": 1}
    assert agreement(labels, np.array([2, 0, 0, 1])) == 0.75
