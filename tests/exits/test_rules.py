"""Every exit rule against a slow reference, and what all rules have in common."""

import numpy as np
import pytest
import torch
from sklearn.covariance import OAS
from sklearn.datasets import load_digits
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from ssl_exit.errors import InputError
from ssl_exit.exits.centroid import CentroidRule, oas_shrinkage
from ssl_exit.exits.kmeans import kmeans
from ssl_exit.exits.means import E2CMRule, EuclideanRule
from ssl_exit.exits.own_clusters import KMeansRule, PrototypesRule
from ssl_exit.exits.rules import RULES, rule_named
from ssl_exit.exits.statistics import ClusterStatistics


@pytest.fixture(scope="module")
def data():
    """Descriptors and "final clusters" with structure: digits, and k-means of them; 1,200 to fit, 597 unseen."""
    x = torch.tensor(load_digits().data, dtype=torch.float32)
    centroids, _ = kmeans(x.numpy(), 10)
    labels = torch.cdist(x, torch.from_numpy(centroids)).argmin(1)
    noisy = x + torch.randn(x.shape, generator=torch.Generator().manual_seed(0)) * 2
    return noisy[:1200], labels[:1200], noisy[1200:], labels[1200:]


def fit(rule_class, x, labels, k=10):
    statistics = ClusterStatistics.empty(k, torch.zeros(x.shape[1]))
    statistics.add(x, labels)
    rule = rule_class(x.shape[1], k)
    rule.fit(statistics, x, labels, seed=0)
    return rule


@pytest.mark.parametrize("name", sorted(RULES))
def test_what_all_rules_promise(name, data):
    x, labels, unseen, truth = data
    rule = fit(rule_named(name), x, labels)
    found, scores = rule(unseen)
    assert found.dtype == torch.int64
    assert ((scores >= 0) & (scores <= 1)).all()
    assert (found == truth).float().mean() > 0.75
    sure = scores >= scores.median()
    assert (found == truth)[sure].float().mean() > (found == truth)[~sure].float().mean()
    assert rule.macs >= 10 * 64
    broken = unseen[:3].clone()
    broken[1, 5] = torch.nan
    assert torch.isnan(rule(broken)[1]).tolist() == [False, True, False]
    copy = rule_named(name)(64, 10)
    copy.load_state_dict(rule.state_dict())
    assert torch.equal(copy(unseen)[1], scores)


@pytest.mark.parametrize("name", sorted(RULES))
def test_a_cluster_without_images_does_no_harm(name, data):
    x, labels, unseen, _ = data
    rule = fit(rule_named(name), x, labels.clamp(max=7), k=10)
    found, scores = rule(unseen)
    assert scores.isfinite().all()
    assert name == "kmeans" or (found <= 7).all()  # kmeans has as many clusters of its own


def test_centroid_rule_is_linear_discriminant_analysis(data):
    x, labels, unseen, _ = data
    rule = fit(CentroidRule, x, labels)
    statistics = ClusterStatistics.empty(10, torch.zeros(64))
    statistics.add(x, labels)
    deviation = statistics.within_covariance.diagonal().sqrt()
    used = deviation > 1e-3
    whitened = ((x - x.mean(0)) / deviation)[:, used].double().numpy()
    correlation = (statistics.within_covariance / deviation[:, None] / deviation)[used][:, used]
    shrinkage = oas_shrinkage(correlation, len(x))
    assert 0 < shrinkage < 0.2
    reference = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage).fit(whitened, labels.numpy())
    seen = ((unseen - x.mean(0)) / deviation)[:, used].double().numpy()
    ours = torch.softmax(rule.logits(unseen), 1).numpy()
    np.testing.assert_allclose(ours, reference.predict_proba(seen), atol=0.02)
    assert (ours.argmax(1) == reference.predict(seen)).mean() > 0.995


def test_oas_is_close_to_scikit_learns():
    x = np.random.default_rng(0).normal(size=(50, 20)) @ np.diag(np.linspace(1, 3, 20))
    empirical = np.cov(x.T, bias=True)
    # scikit-learn leaves out the terms 2 / D of the paper's equation
    assert oas_shrinkage(torch.from_numpy(empirical), 50) == pytest.approx(OAS().fit(x).shrinkage_, abs=0.01)
    assert oas_shrinkage(torch.eye(4).double(), 10) == 1


def test_centroid_rule_ignores_entries_that_never_vary(data):
    x, labels, unseen, _ = data
    constant = torch.full((len(x), 1), 7.0)
    wide = fit(CentroidRule, torch.cat([x, constant], 1), labels)
    logits = wide.logits(torch.cat([unseen, torch.full((len(unseen), 1), 7.0)], 1))
    narrow = fit(CentroidRule, x, labels).logits(unseen)
    assert (logits.argmax(1) == narrow.argmax(1)).float().mean() > 0.99


def test_euclidean_and_e2cm_by_hand():
    x = torch.tensor([[0.0, 0.0], [2.0, 0.0], [10.0, 0.0], [10.0, 6.0]])
    labels = torch.tensor([0, 0, 1, 1])  # means (1, 0) and (10, 3); mean distances 1 and 3
    point = torch.tensor([[1.0, 4.0]])
    torch.testing.assert_close(fit(EuclideanRule, x, labels, 2).logits(point), torch.tensor([[-16.0, -82.0]]))
    e2cm = fit(E2CMRule, x, labels, 2)
    torch.testing.assert_close(e2cm.logits(point), torch.tensor([[-4.0, -(82**0.5) / 3]]))
    label, score = e2cm(point)
    assert label.item() == 1
    assert score.item() == pytest.approx(1 / (1 + np.exp(-4 + 82**0.5 / 3)))


def test_kmeans_rule_is_the_nearest_matched_centroid(data):
    x, labels, unseen, _ = data
    rule = fit(KMeansRule, x, labels)
    found, _ = rule(unseen)
    assert torch.equal(found, torch.cdist(unseen, rule.centroids).argmin(1))
    own = torch.cdist(x, rule.centroids).argmin(1)
    assert (own == labels).float().mean() > 0.75  # matched: cluster i of the layer means final cluster i


def test_prototypes_carry_the_distribution_of_their_images(data):
    x, labels, unseen, _ = data
    rule = fit(PrototypesRule, x, labels)
    used = int(rule.centroids[:, 0].isfinite().sum())
    assert used == len(x) // 10
    own = torch.cdist(x, rule.centroids[:used]).argmin(1)
    i = int(own[0])
    counts = torch.bincount(labels[own == i], minlength=10).double()
    prior = torch.bincount(labels, minlength=10).double() + 1
    expected = (counts + prior / prior.sum()) / (counts.sum() + 1)
    torch.testing.assert_close(rule.log_p[i].exp().double(), expected, rtol=1e-4, atol=1e-6)
    nearest = torch.cdist(unseen[:5], rule.centroids[:used]).argmin(1)
    torch.testing.assert_close(rule.logits(unseen[:5]), rule.log_p[nearest])


def test_temperature_makes_scores_mean_what_they_say(data):
    x, labels, unseen, truth = data
    rule = fit(CentroidRule, x, labels)
    logits = 4 * rule.logits(unseen)  # far too sure
    rule.fit_temperature(logits, truth)
    likelihood = -torch.nn.functional.cross_entropy(logits / rule.temperature, truth)
    for factor in (0.8, 1.25):
        other = -torch.nn.functional.cross_entropy(logits / (rule.temperature * factor), truth)
        assert other < likelihood
    found, scores = rule.decide(logits)
    assert abs(scores.mean() - (found == truth).float().mean()) < 0.03


def test_unknown_rules_are_refused():
    with pytest.raises(InputError, match=r"'nearest' does not exist; choose one of \['centroid'"):
        rule_named("nearest")
