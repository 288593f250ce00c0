"""Trained heads: what training leaves behind, and each paper's loss and score."""

import math
import time

import numpy as np
import pytest
import torch

from ssl_exit.errors import InputError
from ssl_exit.exits.branchynet import BranchyNetRule
from ssl_exit.exits.centroid import CentroidRule
from ssl_exit.exits.eenet import EENetRule
from ssl_exit.exits.heads import _Trainee, one_cycle
from ssl_exit.exits.mlp import MLPRule
from ssl_exit.exits.rules import FitData
from ssl_exit.exits.sdn import SDNRule
from ssl_exit.exits.statistics import ClusterStatistics

HEADS = [SDNRule, BranchyNetRule, EENetRule, MLPRule]


@pytest.fixture(scope="module")
def data():
    """Two clusters on a ring and in its middle, which no linear rule separates; 2,000 to fit, 1,000 unseen."""
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(2, (3000,), generator=g)
    angle = torch.rand(3000, generator=g) * 2 * math.pi
    radius = labels * 2.0 + 0.3 * torch.randn(3000, generator=g)
    x = torch.stack([radius * angle.cos() + 5, radius * angle.sin() * 100], 1)  # far from standardised
    return x[:2000], labels[:2000], x[2000:], labels[2000:]


def training(x, labels, k=2):
    statistics = ClusterStatistics.empty(k, x.double().mean(0))
    statistics.add(x, labels)
    return FitData(statistics, x, labels, torch.nn.functional.one_hot(labels, k).float(), seed=0)


@pytest.mark.parametrize("head", HEADS)
def test_a_hidden_layer_learns_what_centroids_cannot(head, data):
    x, labels, unseen, truth = data
    centroid = CentroidRule(2, 2)
    centroid.fit(training(x, labels))
    assert (centroid(unseen)[0] == truth).float().mean() < 0.7
    rule = head(2, 2, hidden=32, epochs=20, learning_rate=1e-2)
    rule.fit(training(x, labels))
    found, scores = rule(unseen)
    assert (found == truth).float().mean() > 0.97
    assert scores.min() >= 0
    assert scores.max() <= 1


@pytest.mark.parametrize("head", HEADS)
def test_training_is_reproducible_and_leaves_the_global_generator_alone(head, data):
    x, labels, unseen, _ = data
    state = torch.random.get_rng_state()
    one, two = (head(2, 2, epochs=2) for _ in range(2))
    for rule in (one, two):
        rule.fit(training(x, labels))
    assert torch.equal(one(unseen)[1], two(unseen)[1])
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("hidden", [0, 16])
def test_from_centroids_without_training_a_head_is_the_centroid_rule(hidden, data):
    x, labels, unseen, _ = data
    x, unseen = (torch.cat([part, torch.full((len(part), 1), 3.0)], 1) for part in (x, unseen))  # one never varies
    rule = SDNRule(3, 2, hidden=hidden, start="centroid", epochs=0)
    rule.fit(training(x, labels))
    centroid = CentroidRule(3, 2)
    centroid.fit(training(x, labels))
    ours, theirs = rule.logits(unseen), centroid.logits(unseen)
    scale = (theirs[:, 0] - theirs[:, 1]).std() / (ours[:, 0] - ours[:, 1]).std()  # a temperature
    torch.testing.assert_close((ours[:, 0] - ours[:, 1]) * scale, theirs[:, 0] - theirs[:, 1], rtol=1e-3, atol=1e-3)


def test_what_is_handed_over_is_what_was_trained(data):
    x, labels, unseen, _ = data
    rule = MLPRule(2, 2, hidden=8)
    torch.manual_seed(0)
    trainee = _Trainee(rule, training(x, labels))
    trainee.train()(x)  # moves the running statistics
    trainee.eval().hand_over(rule)
    torch.testing.assert_close(rule.logits(unseen), trainee(unseen), rtol=1e-4, atol=1e-4)


def test_a_budget_of_seconds_is_kept(data):
    x, labels, _, _ = data
    rule = SDNRule(2, 2, seconds=0.5, epochs=0)
    began = time.perf_counter()
    rule.fit(training(x, labels))
    assert 0.5 <= time.perf_counter() - began < 5
    assert rule.weight.abs().sum() > 0


def test_entropy_by_hand():
    rule = BranchyNetRule(4, 4)
    p = torch.tensor([[0.25] * 4, [1.0, 0, 0, 0], [0.5, 0.5, 0, 0]])
    torch.testing.assert_close(rule.score(p.log(), p), torch.tensor([0.0, 1.0, 0.5]))


def test_eenet_loss_is_the_recursion_by_hand():
    rule = EENetRule(3, 2, tradeoff=0.7)
    outputs = [torch.tensor([[1.0, -1.0, 0.3]]), torch.tensor([[0.2, 0.4, -2.0]])]
    costs = torch.tensor([0.25, 0.5, 1.0])
    h = [1 / (1 + math.exp(-0.3)), 1 / (1 + math.exp(2.0))]
    y = [math.exp(1) / (math.exp(1) + math.exp(-1)), math.exp(0.2) / (math.exp(0.2) + math.exp(0.4))]
    second, c_second = h[1] * y[1] + 1 - h[1], h[1] * 0.5 + (1 - h[1]) * 1.0
    first, c_first = h[0] * y[0] + (1 - h[0]) * second, h[0] * 0.25 + (1 - h[0]) * c_second
    expected = -math.log(second) + 0.7 * c_second - math.log(first) + 0.7 * c_first
    soft = torch.tensor([[1.0, 0.0]])
    assert rule.loss(outputs, torch.tensor([0]), soft, costs, 0.6).item() == pytest.approx(expected, rel=1e-5)
    alone = -math.log(y[0]) - math.log(y[1])  # the first stage
    assert rule.loss(outputs, torch.tensor([0]), soft, costs, 0.4).item() == pytest.approx(alone, rel=1e-5)
    label, score = rule.decide(outputs[0])
    assert label.item() == 0
    assert score.item() == pytest.approx(h[0])


def test_dearer_exits_make_eenet_leave_earlier(data):
    x, labels, unseen, _ = data
    leaving = []
    for tradeoff in (0.01, 10.0):
        rules = [EENetRule(2, 2, tradeoff=tradeoff, hidden=0, epochs=10) for _ in range(2)]
        EENetRule.fit_all(rules, [training(x, labels)] * 2, np.array([0.1, 0.5, 1.0]))
        leaving.append((rules[0](unseen)[1] > 0.5).float().mean().item())
    assert leaving[0] < 0.2
    assert leaving[1] > 0.9


def test_soft_targets_teach_how_sure_to_be(data):
    x, labels, unseen, _ = data
    unsure = FitData(training(x, labels).statistics, x, labels, torch.full((len(x), 2), 0.5), seed=0)
    rule = MLPRule(2, 2, epochs=5)
    rule.fit(unsure)
    assert rule(unseen)[1].max() < 0.7


def test_the_schedule_rises_and_falls():
    rates = [one_cycle(p) for p in np.linspace(0, 1, 101)]
    assert rates[0] == pytest.approx(0.04)
    assert max(rates) == pytest.approx(1)
    assert rates[-1] == pytest.approx(0)
    assert np.argmax(rates) == 30


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": "zero"}, "start must be one of"),
        ({"hidden": -1}, "hidden=-1"),
        ({"seconds": 0}, "seconds=0"),
        ({"learning_rate": 0}, "learning_rate=0"),
        ({"epochs": -1}, "epochs=-1"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        SDNRule(2, 2, **options)
    with pytest.raises(InputError, match="tradeoff"):
        EENetRule(2, 2, tradeoff=-1)
