"""What the full encoder answers."""

import pickle
import warnings

import faiss
import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.cluster import KMeans

from ssl_exit import ExitClusterer
from ssl_exit.encoders.small import digits_encoder
from ssl_exit.errors import InputError
from ssl_exit.exits.final import FinalClasses, FinalClusters
from tests import conftest


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


@pytest.mark.parametrize("front", [pytest.param("none", marks=pytest.mark.slow), "auto"])
def test_clusters_of_ones_own_are_what_exits_agree_with(digits, front):
    torch.manual_seed(0)
    encoder = digits_encoder().eval()
    with torch.no_grad():
        features = encoder(digits).flatten(1).numpy()
    kmeans = KMeans(5, n_init=1, random_state=0).fit(features[:900])
    own = faiss.Kmeans(features.shape[1], 4, spherical=True, seed=1)
    own.train(np.ascontiguousarray(features[:900] / np.linalg.norm(features[:900], axis=1, keepdims=True)))
    absent = np.vstack([kmeans.cluster_centers_, np.full((1, features.shape[1]), 1e3, np.float32)])
    how = {"max_disagreement": 0.3, "confidence": 0.5, "front": front, "front_epochs": 1}
    directions = own.centroids / np.linalg.norm(own.centroids, axis=1, keepdims=True)
    distances, cosines = kmeans.transform(features), -features @ directions.T
    cosines /= np.linalg.norm(features, axis=1, keepdims=True)
    for clusters, flat, far in (
        (kmeans, {}, distances),
        (own, {}, cosines),
        (own.centroids, {}, cosines),
        (torch.from_numpy(absent), {"spherical": False}, distances),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            c = conftest.clusterer(encoder, **how, **flat).set_params(n_clusters=clusters).fit(digits[:900])
        labels, nearest = c.predict_full(digits), far.min(1)
        np.testing.assert_allclose(np.take_along_axis(far, labels[:, None], 1)[:, 0], nearest, atol=1e-5)  # or a tie
        assert (labels == far.argmin(1)).mean() > 0.99
        assert (c.predict(digits[900:]) == labels[900:]).mean() > 0.6
        assert c.model_.settings.clusters.spherical == (far is cosines)
    again = pickle.loads(pickle.dumps(c))
    np.testing.assert_array_equal(again.predict(digits[900:]), c.predict(digits[900:]))
    assert clone(c).n_clusters is not c.n_clusters
    assert c.model_.settings.clusters.centroids is None


@pytest.mark.parametrize(
    ("clusters", "message"),
    [
        (np.zeros((3, 7)), "centroids of 7 features do not fit the encoder, which gives"),
        (np.zeros(3), "final centroids"),
        (np.full((3, 128), np.nan), "finite entries"),
        ([["a"]], "final centroids"),
        (object(), "final centroids"),
        (KMeans(3), "final centroids"),
        ("many", "n_clusters must be a whole number"),
    ],
)
def test_what_are_no_clusters_is_refused(clusters, message, digits):
    with pytest.raises(InputError, match=message):
        ExitClusterer(digits_encoder(), n_clusters=clusters).fit(digits[:100])
