"""k-means over clients."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssl_exit import InputError
from ssl_exit.federated import dirichlet_split
from ssl_exit.federated.kmeans import lloyd_step, start_from, trimmed


def points(n, seed=0):
    return np.random.default_rng(seed).normal(size=(n, 3)) + 4 * (np.arange(n)[:, None] % 4)


def sums_and_counts(x, centroids):
    nearest = np.square(x[:, None] - centroids[None]).sum(2).argmin(1)
    k = len(centroids)
    return np.stack([x[nearest == i].sum(0) for i in range(k)]), np.bincount(nearest, minlength=k)


@given(st.lists(st.integers(0, 3), min_size=40, max_size=40))
def test_a_step_is_that_of_all_points_whoever_has_them(owners):
    x, owners = points(40), np.array(owners)
    centroids = x[:4].astype(np.float32)
    parts = [sums_and_counts(x[owners == m], centroids) for m in range(4)]
    sums, counts = np.stack([s for s, _ in parts]), np.stack([c for _, c in parts])
    step = lloyd_step(trimmed(sums, counts, 0), counts.sum(0), x, np.ones(40), spherical=False)
    nearest = np.square(x[:, None] - centroids[None]).sum(2).argmin(1)
    for k in range(4):
        np.testing.assert_allclose(step[k], x[nearest == k].mean(0), rtol=1e-5)


@pytest.mark.parametrize("spherical", [False, True])
def test_an_empty_cluster_moves_to_where_many_images_are_far_from_all_others(spherical):
    sums, counts = np.array([[10.0, 0.0], [0.0, 0.0]]), np.array([10, 0])
    pool, sizes = np.array([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]]), np.array([10, 50, 1])
    step = lloyd_step(sums, counts, pool, sizes, spherical=spherical)
    np.testing.assert_allclose(step, [[1, 0], [0, 1]], atol=1e-6)


def test_the_start_does_not_depend_on_the_order_of_clients():
    pool, sizes = points(12).astype(np.float32), np.arange(1, 13)
    order = np.random.default_rng(1).permutation(12)
    first = start_from(pool, sizes, 4, spherical=False, seed=0)
    second = start_from(pool[order], sizes[order], 4, spherical=False, seed=0)
    np.testing.assert_array_equal(first, second)


@given(st.floats(-1e6, 1e6))
def test_one_client_moves_a_trimmed_mean_no_further_than_the_others_reach(lie):
    rng = np.random.default_rng(2)
    counts = rng.integers(1, 20, size=(7, 2))
    means = rng.normal(size=(7, 2, 3))
    means[3] = lie
    result = trimmed(means * counts[..., None], counts, 0.1) / counts.sum(0)[:, None]
    honest = np.delete(means, 3, axis=0)
    assert (result >= honest.min(0) - 1e-9).all()
    assert (result <= honest.max(0) + 1e-9).all()


def test_a_trimmed_mean_is_over_the_clients_that_have_the_cluster():
    sums, counts = np.array([[[4.0]], [[0.0]], [[6.0]]]), np.array([[2], [0], [3]])
    np.testing.assert_allclose(trimmed(sums, counts, 0.2), [[10.0]])  # two clients: nobody can be cut
    assert trimmed(np.zeros((3, 1, 1)), np.zeros((3, 1)), 0.2) == 0


@given(st.integers(1, 12), st.sampled_from([0.05, 0.3, 100.0, np.inf]), st.integers(0, 5))
def test_a_split_gives_every_image_to_one_client_and_every_client_an_image(n_clients, alpha, seed):
    targets = np.arange(60) % 5
    parts = dirichlet_split(targets, n_clients, alpha, seed)
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(60))
    assert all(len(part) for part in parts)
    if np.isinf(alpha) and n_clients == 4:
        assert {len(part) for part in parts} == {15}


def test_a_split_that_cannot_be():
    for n_clients, alpha in ((0, 1.0), (7, 1.0), (2, 0.0), (2, -1.0), (2, np.nan)):
        with pytest.raises(InputError, match="a split needs alpha > 0 and 1 to 6 clients"):
            dirichlet_split(np.zeros(6), n_clients, alpha)
