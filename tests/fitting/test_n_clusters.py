"""The number of clusters, chosen."""

import numpy as np
import pytest
import torch
from sklearn.datasets import make_blobs

from ssl_exit import Clusters, ExitClusterer, Front, InputError, Runtime, load
from ssl_exit.fitting.n_clusters import choose_n_clusters

QUIET = {"runtime": Runtime(progress=False), "device": "cpu", "max_disagreement": 0.2, "confidence": 0.5}


@pytest.mark.parametrize("n_clusters", [3, 7, 12])
@pytest.mark.parametrize("spherical", [True, False])
def test_as_many_clusters_as_there_are_are_found(n_clusters, spherical):
    points, _ = make_blobs(900, 8, centers=n_clusters, cluster_std=0.8, random_state=n_clusters)
    counts = choose_n_clusters(torch.from_numpy(points).float(), spherical=spherical, seed=0)
    best = max(counts, key=lambda one: one.merit)
    assert best.n_clusters == n_clusters
    assert best.stability > 0.99
    assert [one.n_clusters for one in counts] == sorted(one.n_clusters for one in counts)
    assert max(one.n_clusters for one in counts) * 20 <= 900


@pytest.mark.slow
def test_handwritten_digits_are_about_ten(digits):
    counts = choose_n_clusters(digits.flatten(1), spherical=True, seed=0)
    assert 9 <= max(counts, key=lambda one: one.merit).n_clusters <= 11


@pytest.mark.parametrize("front", [None, Front("auto", width=4, epochs=1)])
def test_a_fit_that_chooses_equals_one_that_is_told(front, digits, tmp_path):
    encoder = torch.nn.Sequential(*(torch.nn.AvgPool2d(1) for _ in range(3)), torch.nn.Flatten())
    images, rest = digits[:1500], digits[1500:]
    c = ExitClusterer(encoder, "auto", front=front, exits=["0"] if front is None else "auto", **QUIET).fit(images)
    k = max(c.cluster_counts_, key=lambda one: one.merit).n_clusters
    assert len(c.cluster_centers_) == k == c.model_.settings.n_clusters
    assert c.n_clusters == "auto"
    told = ExitClusterer(encoder, k, front=front, exits=["0"] if front is None else "auto", **QUIET).fit(images)
    np.testing.assert_array_equal(c.cluster_centers_, told.cluster_centers_)
    assert told.cluster_counts_ == []
    c.save(tmp_path / "model")
    again = load(tmp_path / "model", encoder)
    assert again.cluster_counts_ == c.cluster_counts_
    assert again.inertia_ == c.inertia_
    np.testing.assert_array_equal(again.predict(rest), c.predict(rest))


def test_where_there_is_nothing_to_choose(digits):
    encoder = torch.nn.Flatten()
    with pytest.raises(InputError, match="in the supervised mode n_clusters is the number of classes"):
        ExitClusterer(encoder, "auto", clusters=Clusters(supervised=True), **QUIET).fit(digits[:300])
    with pytest.raises(InputError, match="needs at least 40 usable images to fit; there are 24"):
        ExitClusterer([torch.nn.AvgPool2d(1), encoder], "auto", exits=["stage0"], **QUIET).fit(digits[:30])
    with pytest.raises(InputError, match=r"n_clusters must be a whole number in \[1, inf\) or 'auto'; got"):
        ExitClusterer(encoder, "some", **QUIET).fit(digits[:30])
