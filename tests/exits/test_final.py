"""What the full encoder answers."""

import pytest
import torch

from ssl_exit.errors import InputError
from ssl_exit.exits.final import FinalClasses, FinalClusters


def test_final_clusters_by_hand():
    centroids = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    features = torch.tensor([[5.0, 1.0], [0.1, 0.2], [torch.nan, 1.0], [torch.inf, 0.0]])
    assert FinalClusters(centroids, spherical=True)(features).tolist() == [0, 1, -1, -1]
    far = FinalClusters(torch.tensor([[0.0, 0.0], [4.0, 0.0]]), spherical=False)
    assert far(torch.tensor([[1.9, 0.0], [2.1, 0.0], [1.0, 50.0]])).tolist() == [0, 1, 0]


def test_soft_assignments_by_hand():
    spherical = FinalClusters(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), spherical=True)
    features = torch.tensor([[3.0, 4.0]])  # cosines 0.6 and 0.8
    torch.testing.assert_close(spherical.soft(features), torch.softmax(torch.tensor([[6.0, 8.0]]), dim=1))
    far = FinalClusters(torch.tensor([[0.0, 0.0], [4.0, 0.0]]), spherical=False)
    two = torch.tensor([[1.0, 0.0], [3.0, 0.0]])  # squared distances 1 and 9; to the nearest 1 on average
    torch.testing.assert_close(far.soft(two), torch.softmax(torch.tensor([[-1.0, -9.0], [-9.0, -1.0]]), dim=1))


def test_classes_are_the_largest_logit():
    logits = torch.tensor([[0.0, 2.0, 1.0], [5.0, 0.0, 0.0], [torch.nan, 0.0, 0.0]])
    final = FinalClasses.of(logits, 3)
    assert final(logits).tolist() == [1, 0, -1]
    assert (final.n_clusters, final.macs) == (3, 0)
    torch.testing.assert_close(final.soft(logits[:2]).sum(1), torch.ones(2))
    with pytest.raises(InputError, match="it gives 3 numbers and n_clusters is 10"):
        FinalClasses.of(logits, 10)
