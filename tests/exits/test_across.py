"""Patience and ensembling against loops over exits."""

import pytest
import torch

from ssl_exit.exits.across import AcrossExits
from ssl_exit.exits.means import EuclideanRule

K = 3


def exits(n=50, e=4, seed=0):
    """Rules that pass logits through, and random logits, (n, e, K)."""
    rules = [EuclideanRule(2, K) for _ in range(e)]
    for i, rule in enumerate(rules):
        rule.temperature.fill_(0.5 + i)
    return rules, torch.randn(n, e, K, generator=torch.Generator().manual_seed(seed)) * 2


def run(across, rules, logits):
    state = across.begin(len(logits), K, torch.device("cpu"))
    assert state.shape == across.decide(rules[0], logits[:, 0], state, 0)[2].shape == (len(logits), across.width(K))
    return across.decide_all(tuple(rules), list(logits.unbind(1)))


def test_off_means_every_exit_for_itself():
    rules, logits = exits()
    assert not AcrossExits().active
    labels, scores = AcrossExits().decide_all(tuple(rules), list(logits.unbind(1)))
    for i, rule in enumerate(rules):
        label, score = rule.decide(logits[:, i])
        assert torch.equal(labels[:, i], label)
        assert torch.equal(scores[:, i], score)


@pytest.mark.parametrize("ensemble", [False, True])
@pytest.mark.parametrize("patience", [1, 2, 3])
def test_both_equal_a_loop(patience, ensemble):
    rules, logits = exits()
    labels, scores = run(AcrossExits(patience, ensemble), rules, logits)
    for n in range(len(logits)):
        said = []
        for i in range(len(rules)):
            each = [torch.softmax(logits[n, j] / rules[j].temperature, 0) for j in range(i + 1)]
            p = each[-1]
            if ensemble:
                p = torch.stack(each).log().mean(0).exp()
                p = p / p.sum()
            said.append(int(p.argmax()))
            agreed = len(said) >= patience and len(set(said[-patience:])) == 1
            assert labels[n, i] == said[-1]
            expected = float(p.max()) if agreed else float("nan")
            assert scores[n, i].item() == pytest.approx(expected, abs=1e-5, nan_ok=True)


def test_nan_stays_nan():
    rules, logits = exits()
    logits[3, 1] = torch.nan
    _, scores = run(AcrossExits(2, True), rules, logits)
    assert scores[3, 1:].isnan().all()
    _, scores = run(AcrossExits(ensemble=True), rules, logits)
    assert scores[3, 1:].isnan().all()
    assert scores[:3].isfinite().all()
