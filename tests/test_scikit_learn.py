"""scikit-learn's words: what works with KMeans works here."""

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.utils.estimator_checks import parametrize_with_checks

from ssl_exit import Clusters, ExitClusterer, InputError, Runtime
from ssl_exit.encoders.small import digits_encoder
from ssl_exit.exits.classifier import RuleClassifier
from ssl_exit.training.run import seeded

QUIET = {"runtime": Runtime(progress=False), "device": "cpu", "max_disagreement": 0.2, "confidence": 0.5}


@pytest.fixture(scope="module")
def encoder():
    with seeded(0):
        return digits_encoder().eval()


@pytest.fixture(scope="module")
def features(encoder, digits):
    with torch.no_grad():
        return encoder(digits)


@parametrize_with_checks([RuleClassifier(), RuleClassifier("prototypes")])
def test_a_rule_is_a_classifier(estimator, check):
    check(estimator)


@pytest.mark.parametrize("rule", ["mahalanobis", "e2cm", "mlp", "eenet", "centroid+prototypes"])
def test_every_kind_of_rule_is_one(rule, features):
    far = (features[:, 0] > features[:, 0].median()).numpy()
    names = np.array(["near", "far"])[far.astype(int)]
    c = RuleClassifier(rule).fit(features.numpy(), names)
    assert c.score(features.numpy(), names) > 0.6
    np.testing.assert_allclose(c.predict_proba(features.numpy()).sum(1), 1, atol=1e-5)


@pytest.mark.parametrize("spherical", [False, True])
def test_inertia_score_and_distances_are_those_of_the_final_clusters(spherical, encoder, features, digits):
    c = ExitClusterer(encoder, 4, clusters=Clusters(spherical=spherical), **QUIET).fit(digits[:1000])
    points = torch.nn.functional.normalize(features, dim=1) if spherical else features
    distances = torch.cdist(points.double(), torch.from_numpy(c.cluster_centers_).double())
    np.testing.assert_allclose(c.transform(digits), distances, atol=1e-3)
    squares = distances.square().numpy()
    labels = c.predict(digits)
    assert c.score(digits) == pytest.approx(-squares[np.arange(len(labels)), labels].sum(), rel=1e-3)
    order = np.random.default_rng(0).permutation(1000)[200:]  # all that were fitted, which k-means saw
    assert c.inertia_ == pytest.approx(squares[order].min(1).sum(), rel=1e-3)


@pytest.mark.slow
def test_weights_decide_what_k_means_finds(encoder, digits):
    images = digits[:900]
    some = np.zeros(900)
    some[:450] = 1
    c = ExitClusterer(encoder, 3, clusters=Clusters(spherical=False), **QUIET)
    weighted, all_alike = c.fit(images, sample_weight=some).cluster_centers_, c.fit(images).cluster_centers_
    assert not np.allclose(weighted, all_alike)
    with torch.no_grad():
        held = np.random.default_rng(0).permutation(900)[:180]
        fitted = np.setdiff1d(np.arange(450), held)
        ours = KMeans(3, init=weighted, n_init=1, max_iter=1).fit(encoder(images[fitted]).double().numpy())
    np.testing.assert_allclose(ours.cluster_centers_, weighted, atol=0.02)  # a fixed point of Lloyd's steps
    for each in (2.0, 3e38, 1e-300):
        assert np.array_equal(c.fit(images, sample_weight=np.full(900, each)).cluster_centers_, all_alike)
    assert np.array_equal(c.fit(images, sample_weight=np.where(some, 1, 1e-42)).cluster_centers_, weighted)


@pytest.mark.parametrize("weights", [np.ones(5), -np.ones(400), np.zeros(400), np.full(400, np.nan), ["a"] * 400])
def test_weights_that_are_none_are_refused(weights, encoder, digits):
    with pytest.raises(InputError, match="sample_weight must hold one finite number >= 0 for each of the 400 images"):
        ExitClusterer(encoder, 3, **QUIET).fit(digits[:400], sample_weight=weights)


def test_weights_that_leave_k_means_nothing_are_refused(encoder, digits):
    held = np.random.default_rng(0).permutation(400)[:80]
    weights = np.isin(np.arange(400), held).astype(float)
    with pytest.raises(InputError, match="0 for all images that k-means sees"):
        ExitClusterer(encoder, 3, **QUIET).fit(digits[:400], sample_weight=weights)


@pytest.mark.slow
def test_a_grid_search_without_a_scorer_and_a_pipeline(encoder, digits):
    flat = digits.flatten(1).numpy()
    images = FunctionTransformer(lambda x: torch.from_numpy(x).reshape(-1, 1, 8, 8))
    pipeline = make_pipeline(images, ExitClusterer(encoder, 3, **QUIET))
    search = GridSearchCV(pipeline, {"exitclusterer__n_clusters": [2, 5]}, cv=2).fit(flat[:800])
    assert search.best_params_ == {"exitclusterer__n_clusters": 5}  # more centroids are nearer
    assert search.predict(flat[800:]).max() < 5


def test_before_fit(encoder, digits):
    c = ExitClusterer(encoder, 3, **QUIET)
    for call in (c.transform, c.score, c.embed):
        with pytest.raises(NotFittedError):
            call(digits[:2])
