"""Every exit rule against a slow reference, and what all rules have in common."""

import numpy as np
import pytest
import torch
from sklearn.covariance import OAS
from sklearn.datasets import load_digits
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from ssl_exit.errors import InputError
from ssl_exit.exits.centroid import CentroidRule
from ssl_exit.exits.combined import CombinedRule
from ssl_exit.exits.e2cm import E2CMReleasedRule, E2CMRule
from ssl_exit.exits.kmeans import kmeans
from ssl_exit.exits.mahalanobis import MahalanobisRule, oas_shrinkage
from ssl_exit.exits.means import EuclideanRule
from ssl_exit.exits.own_clusters import KMeansRule, PrototypesRule
from ssl_exit.exits.registry import build_rules
from ssl_exit.exits.rules import RULES, FitData
from ssl_exit.exits.statistics import ClusterStatistics


@pytest.fixture(scope="module")
def data():
    """Descriptors and "final clusters" with structure: digits, and k-means of them; 1,200 to fit, 597 unseen."""
    x = torch.tensor(load_digits().data, dtype=torch.float32)
    centroids = kmeans(x.numpy(), 10)
    labels = torch.cdist(x, torch.from_numpy(centroids)).argmin(1)
    noisy = x + torch.randn(x.shape, generator=torch.Generator().manual_seed(0)) * 2
    return noisy[:1200], labels[:1200], noisy[1200:], labels[1200:]


def training(x, labels, k=10):
    statistics = ClusterStatistics.empty(k, torch.zeros(x.shape[1]))
    statistics.add(x, labels)
    return FitData(statistics, x, labels, torch.nn.functional.one_hot(labels, k).float(), seed=0)


def fit(rule, x, labels, k=10, **options):
    """A fitted rule, by class or name."""
    built = build_rules(rule, [x.shape[1]], k, options)[0] if isinstance(rule, str) else rule(x.shape[1], k, **options)
    built.fit(training(x, labels, k))
    return built


NAMES = [*sorted(RULES), "centroid+sdn", "e2cm+mlp"]


@pytest.mark.parametrize("name", NAMES)
def test_what_all_rules_promise(name, data):
    x, labels, unseen, truth = data
    rule = fit(name, x, labels)
    assert rule.logits(unseen).shape == (len(unseen), rule.width)
    torch.testing.assert_close(rule.log_probabilities(rule.logits(unseen)).exp().sum(1), torch.ones(len(unseen)))
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
    copy = build_rules(name, [64], 10)[0]
    copy.load_state_dict(rule.state_dict())
    assert torch.equal(copy(unseen)[1], scores)


@pytest.mark.parametrize("name", NAMES)
def test_a_cluster_without_images_does_no_harm(name, data):
    x, labels, unseen, _ = data
    rule = fit(name, x, labels.clamp(max=7), k=10)
    found, scores = rule(unseen)
    assert scores.isfinite().all()
    own = ("kmeans", "eenet")  # k-means has as many clusters of its own; EENet does not train branches it never uses
    assert name in own or (found <= 7).all()


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
    labels = torch.tensor([0, 0, 1, 1])  # means (1, 0) and (10, 3)
    point = torch.tensor([[1.0, 4.0]])  # squared distances 16 and 82
    torch.testing.assert_close(fit(EuclideanRule, x, labels, 2).logits(point), torch.tensor([[-16.0, -82.0]]))
    e2cm = fit(E2CMRule, x, labels, 2)
    first = (1 + 1 + 9 + (81 + 36) ** 0.5) / 4  # mean distance of all four images to (1, 0)
    second = ((100 + 9) ** 0.5 + (64 + 9) ** 0.5 + 3 + 3) / 4
    torch.testing.assert_close(e2cm.logits(point), torch.tensor([[-4 / first, -(82**0.5) / second]]))
    label, score = e2cm(point)
    assert label.item() == 0
    assert score.item() == pytest.approx(1 / (1 + np.exp(4 / first - 82**0.5 / second)))
    released = fit(E2CMReleasedRule, x, labels, 2)
    torch.testing.assert_close(released.logits(point), torch.tensor([[-4 / 82**0.5, -1.0]]))


def test_e2cm_is_a_loop_over_images_and_means(data):
    x, labels, unseen, _ = data
    rules = fit(E2CMRule, x, labels), fit(E2CMReleasedRule, x, labels)
    means = [x[labels == k].mean(0) for k in range(10)]
    mean_distance = [torch.stack([torch.dist(image, mean) for image in x]).mean() for mean in means]
    for image in unseen[:20]:
        d = torch.stack([torch.dist(image, mean) for mean in means])
        for rule, scaled in zip(rules, (d / torch.stack(mean_distance), d / d.max()), strict=True):
            expected = (-scaled).exp() / (-scaled).exp().sum()
            label, score = rule(image[None])
            assert label.item() == expected.argmax()
            assert score.item() == pytest.approx(expected.max().item(), abs=1e-4)


def test_the_released_score_saturates(data):
    x, labels, _, _ = data
    rule = fit(E2CMReleasedRule, x, labels)
    ceiling = 1 / (1 + 9 / np.e)
    assert rule(torch.cat([x, rule.means]))[1].max() <= ceiling
    on_a_mean = torch.tensor([[0.0, *[-1.0] * 9]])
    assert rule.decide(on_a_mean)[1].item() == pytest.approx(ceiling)


def test_rules_whose_score_is_the_papers_keep_their_temperature(data):
    x, labels, unseen, truth = data
    for rule_class in (E2CMRule, E2CMReleasedRule):
        rule = fit(rule_class, x, labels)
        rule.fit_temperature(rule.logits(unseen), truth)
        assert rule.temperature == 1


def test_mahalanobis_is_the_nearest_mean_of_whitened_descriptors(data):
    x, labels, unseen, _ = data
    rule = fit(MahalanobisRule, x, labels)
    fitted = training(x, labels).statistics
    covariance, used = fitted.within_covariance, fitted.within_covariance.diagonal().sqrt() > 1e-3
    deviation = covariance.diagonal().sqrt()[used]
    correlation = covariance[used][:, used] / deviation[:, None] / deviation
    rho = oas_shrinkage(correlation, len(x))
    inverse = torch.linalg.inv((1 - rho) * correlation + rho * torch.eye(len(correlation)))
    for image in unseen[:20].double():
        gaps = (image - fitted.means)[:, used] / deviation
        squared = torch.einsum("kd,de,ke->k", gaps, inverse, gaps)
        ours = rule.logits(image[None].float())[0].double()
        torch.testing.assert_close(ours - ours[0], -(squared - squared[0]) / 2, rtol=1e-3, atol=1e-2)
    prior = fit(CentroidRule, x, labels).logits(unseen) - rule.logits(unseen)
    torch.testing.assert_close(prior.mean(0), (torch.bincount(labels) / len(x)).log(), rtol=1e-3, atol=1e-3)


def test_combined_rules_are_a_weighted_product_of_their_probabilities(data):
    x, labels, unseen, truth = data
    rule = fit("centroid+euclidean", x, labels)
    assert isinstance(rule, CombinedRule)
    logits = rule.logits(unseen)
    rule.fit_temperature(logits, truth)
    parts = [part.log_probabilities(part.logits(unseen)) for part in rule.rules]
    mixed = sum(w * log_p for w, log_p in zip(rule.weights, parts, strict=True)).exp()
    torch.testing.assert_close(rule.log_probabilities(logits).exp(), mixed / mixed.sum(1, keepdim=True))
    loss = torch.nn.functional.cross_entropy
    together = loss(rule.log_probabilities(logits), truth)
    assert together <= min(loss(log_p, truth) for log_p in parts) + 1e-4
    assert rule.macs == sum(part.macs for part in rule.rules)


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
    used = int((rule.unused == 0).sum())
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


def test_unknown_rules_and_options_are_refused():
    with pytest.raises(InputError, match=r"'nearest' does not exist; choose one of \['branchynet'"):
        build_rules("nearest", [4], 2)
    with pytest.raises(InputError, match="'nearest' does not exist"):
        build_rules("centroid+nearest", [4], 2)
    with pytest.raises(InputError, match="'centroid' has no option 'epochs'; it has none"):
        build_rules("centroid", [4], 2, {"epochs": 3})
    with pytest.raises(InputError, match=r"'eenet' has no option 'units'; it has \['epochs', 'hidden'.*'tradeoff'\]"):
        build_rules("eenet", [4], 2, {"units": 3})
    assert build_rules("centroid+sdn", [4], 2, {"epochs": 3})[0].rules[1].epochs == 3
