"""k-means by FAISS against scikit-learn and plain loops."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits

from ssl_exit.errors import InputError
from ssl_exit.exits.kmeans import kmeans, match_clusters


def test_inertia_is_scikit_learns():
    x = load_digits().data.astype(np.float32)
    inertia = ((x[:, None] - kmeans(x, 10)) ** 2).sum(2).min(1).sum()
    assert inertia <= 1.01 * KMeans(10, n_init=5, random_state=0).fit(x).inertia_


def test_same_seed_same_centroids():
    x = load_digits().data.astype(np.float32)
    np.testing.assert_array_equal(kmeans(x, 5, seed=3), kmeans(x, 5, seed=3))
    assert not np.array_equal(kmeans(x, 5, seed=3, restarts=1), kmeans(x, 5, seed=4, restarts=1))


def test_spherical_centroids_have_unit_length():
    x = load_digits().data.astype(np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    centroids = kmeans(x, 7, spherical=True)
    np.testing.assert_allclose(np.linalg.norm(centroids, axis=1), 1, atol=1e-5)


def test_no_cluster_runs_empty():
    x = np.concatenate([np.zeros((500, 2)), np.eye(2) * 100]).astype(np.float32) + 1e-3 * np.arange(502)[:, None]
    centroids = kmeans(x, 20)
    nearest = ((x[:, None] - centroids) ** 2).sum(2).argmin(1)
    assert len(np.unique(nearest)) == 20


@pytest.mark.parametrize(
    ("x", "k", "message"),
    [
        (np.zeros((3, 2)), 4, "n_clusters=4 and 3 points"),
        (np.zeros((3, 2)), 0, "n_clusters=0"),
        (np.array([[0.0], [np.nan]]), 1, "finite points"),
    ],
)
def test_wrong_input_is_refused(x, k, message):
    with pytest.raises(InputError, match=message):
        kmeans(x, k)


@settings(max_examples=30)
@given(k=st.integers(1, 6), seed=st.integers(0, 999))
def test_matching_undoes_a_renaming(k, seed):
    rng = np.random.default_rng(seed)
    rename = rng.permutation(k)
    counts = rng.integers(0, 10, (k, k))
    counts[np.arange(k), rename] += 1000
    np.testing.assert_array_equal(match_clusters(counts), rename)
