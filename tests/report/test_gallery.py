"""Which images of a cluster are shown."""

import numpy as np
import pytest

from ssl_exit.report.gallery import Gallery, gallery


@pytest.mark.parametrize("seed", range(5))
def test_the_most_telling_come_first(seed):
    rng = np.random.default_rng(seed)
    n, k, end = 60, 4, 3
    labels, exits = rng.integers(0, k, n), rng.integers(0, end + 1, n)
    exits[:2] = end, 0
    scores = np.where(exits == end, np.nan, rng.random(n))
    distances = rng.random((n, k))
    for cluster in range(k):
        chosen = gallery(cluster, labels, exits, scores, distances, 5)
        members = [i for i in range(n) if labels[i] == cluster]
        margin = {i: sorted(distances[i])[1] - sorted(distances[i])[0] for i in members}
        assert chosen.nearest == sorted(members, key=lambda i: distances[i, cluster])[:5]
        assert chosen.border == sorted(members, key=lambda i: margin[i])[:5]
        left = [i for i in members if exits[i] < end]
        assert chosen.first == sorted(left, key=lambda i: (exits[i], -scores[i]))[:5]
        last = [i for i in members if exits[i] == end]
        assert chosen.last == sorted(last, key=lambda i: distances[i, cluster])[:5]


def test_an_empty_cluster_and_one_cluster_only():
    labels, exits, scores = np.zeros(3, int), np.array([0, 1, 1]), np.array([0.5, np.nan, np.nan])
    none = gallery(1, labels, exits, scores, np.ones((3, 2)), 4)
    assert none == Gallery([], [], [], [])
    assert gallery(0, labels, exits, scores, np.ones((3, 1)), 4).first == [0]
