"""Statistics merge by addition and equal what all descriptors at once give."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ssl_exit.errors import InputError
from ssl_exit.exits.statistics import ClusterStatistics


@given(n=st.integers(1, 40), k=st.integers(1, 4), d=st.integers(1, 5), parts=st.integers(1, 5), seed=st.integers(0, 99))
def test_any_split_gives_the_means_and_covariance_of_the_whole(n, k, d, parts, seed):
    rng = np.random.default_rng(seed)
    x, labels = rng.normal(3, 2, (n, d)).astype(np.float32), rng.integers(0, k, n)
    merged = ClusterStatistics.empty(k, torch.zeros(d))
    for part in np.array_split(np.arange(n), parts):
        one = ClusterStatistics.empty(k, torch.from_numpy(rng.normal(3, 2, d)))
        one.add(torch.from_numpy(x[part]), torch.from_numpy(labels[part]))
        merged = merged + one
    means = np.stack([x[labels == i].mean(0) if (labels == i).any() else x.mean(0) for i in range(k)])
    np.testing.assert_allclose(merged.means, means, atol=1e-4)
    centred = x - means[labels]
    np.testing.assert_allclose(merged.within_covariance, centred.T @ centred / n, atol=1e-3)


def test_leading_block_is_the_statistics_of_the_leading_entries():
    x, labels = torch.randn(30, 6), torch.randint(0, 3, (30,))
    whole, part = ClusterStatistics.empty(3, torch.ones(6)), ClusterStatistics.empty(3, torch.zeros(4))
    whole.add(x, labels)
    part.add(x[:, :4], labels)
    torch.testing.assert_close(whole.leading(4).within_covariance, part.within_covariance, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(whole.leading(4).means, part.means)


def test_statistics_that_do_not_fit_are_not_merged():
    with pytest.raises(InputError, match="cannot be merged"):
        ClusterStatistics.empty(3, torch.zeros(4)) + ClusterStatistics.empty(3, torch.zeros(5))
    with pytest.raises(InputError, match="cannot be merged"):
        ClusterStatistics.empty(3, torch.zeros(4)) + ClusterStatistics.empty(3, torch.zeros(4), scatter=False)
    with pytest.raises(InputError, match="scatter=True"):
        _ = ClusterStatistics.empty(3, torch.zeros(4), scatter=False).within_covariance


def test_an_origin_near_the_mean_keeps_the_digits():
    x = 1e4 + torch.randn(500, 3, generator=torch.Generator().manual_seed(0)).double()
    near = ClusterStatistics.empty(1, torch.full((3,), 1e4))
    near.add(x.float(), torch.zeros(500, dtype=torch.int64))
    expected = np.cov(x.float().double().T, bias=True)
    np.testing.assert_allclose(near.within_covariance, expected, rtol=1e-4, atol=1e-5)
