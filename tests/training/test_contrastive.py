"""SimCLR and MoCo: the losses against slow references, what the exits' weight does, and that training helps."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier

from ssl_exit.data.preprocessing import Preprocessing
from ssl_exit.encoders.small import digits_encoder
from ssl_exit.encoders.tapped import TappedEncoder
from ssl_exit.errors import InputError
from ssl_exit.settings import Optimization
from ssl_exit.training.contrastive import contrastive_loss
from ssl_exit.training.methods import build_training
from ssl_exit.training.run import seeded, train

SMALL = Preprocessing(8, (0.0,), (1.0,))
FAST = Optimization("adamw", 2e-3, weight_decay=1e-4, schedule="one_cycle")


def build(method, seed=0, **options):
    with seeded(seed):
        encoder = digits_encoder()
        tapped = TappedEncoder.build(encoder, "auto", torch.zeros(1, 1, 8, 8))
        module = build_training(method, tapped, SMALL, views="drawing", optimization=FAST, options=options)
    return encoder, module


def knn(encoder, images):
    targets = load_digits().target
    with torch.no_grad():
        features = F.normalize(encoder.eval()(images)).numpy()
    return KNeighborsClassifier(5).fit(features[:900], targets[:900]).score(features[900:], targets[900:])


def nt_xent(one: torch.Tensor, two: torch.Tensor, temperature: float) -> float:
    """SimCLR's equation 1, pair by pair."""
    z = F.normalize(torch.cat([one, two]).double(), dim=1)
    n, total = len(one), 0.0
    for i in range(2 * n):
        positive = (i + n) % (2 * n)
        others = [j for j in range(2 * n) if j != i]
        terms = torch.stack([(z[i] @ z[j] / temperature).exp() for j in others])
        total -= (z[i] @ z[positive] / temperature - terms.sum().log()).item()
    return total / (2 * n)


@pytest.mark.parametrize("exit_weight", [0.0, 0.7])
def test_the_loss_of_simclr_is_its_equation(digits, exit_weight):
    _, module = build("simclr", exit_weight=exit_weight, temperature=0.3)
    module.tapped.eval()
    module.heads.eval()
    views = [digits[:6], digits[6:12]]
    found = module.losses(torch.arange(6), views)
    described, output = module.tapped(torch.cat(views))
    z = module.heads[0](output)
    expected = nt_xent(*z.chunk(2), 0.3)
    if exit_weight:
        parts = described.split([d.dim for d in module.tapped.descriptors], dim=1)
        each = [nt_xent(*h(x).chunk(2), 0.3) for h, x in zip(module.heads[1:], parts, strict=True)]
        assert found["exits"].item() == pytest.approx(np.mean(each), rel=1e-4)
        expected += exit_weight * np.mean(each)
    assert found["loss"].item() == pytest.approx(expected, rel=1e-4)


def test_the_loss_of_moco_is_its_equation_and_fills_the_bank(digits):
    _, module = build("moco", temperature=0.2, bank=20, projection=16, groups=1)
    module.train()
    reference = copy.deepcopy(module)
    bank = module.criteria[0].memory_bank.bank.clone()  # (20, 16)
    one, two = digits[:6], digits[6:12]
    found = module.losses(torch.arange(6), [one, two])
    with torch.no_grad():
        q = F.normalize(reference.heads[0](reference.tapped(torch.cat([one, two]))[1]), dim=1)
        k = F.normalize(reference.key_heads[0](reference.key_tapped(torch.cat([two, one]))[1]), dim=1)
    total = 0.0
    for i in range(12):
        positive = (q[i] @ k[i] / 0.2).exp()
        total -= float((positive / (positive + (bank @ q[i] / 0.2).exp().sum())).log())
    assert found["loss"].item() == pytest.approx(total / 12, rel=1e-4)
    torch.testing.assert_close(module.criteria[0].memory_bank.bank[:12], k)
    assert torch.equal(module.criteria[0].memory_bank.bank[12:], bank[12:])


def test_keys_follow_queries(digits):
    _, module = build("moco", key_momentum=0.9)
    before = {name: p.clone() for name, p in module.key_tapped.named_parameters()}
    with torch.no_grad():
        for p in module.tapped.parameters():
            p.add_(1.0)
    module.losses(torch.arange(8), [digits[:8], digits[8:16]])
    queries = dict(module.tapped.named_parameters())
    for name, key in module.key_tapped.named_parameters():
        torch.testing.assert_close(key, 0.9 * before[name] + 0.1 * queries[name])
        assert not key.requires_grad


def test_keys_come_from_shuffled_groups_and_return_in_order(digits, monkeypatch):
    _, module = build("moco", groups=4)
    module.train()
    images = digits[:64]
    whole = module._projections(module.key_tapped, module.key_heads, images)[0]
    keys = module._keys(images)[0]
    assert ((F.normalize(keys) @ F.normalize(whole).T).argmax(1) == torch.arange(64)).float().mean() > 0.9
    order = torch.arange(64).flip(0)
    monkeypatch.setattr("ssl_exit.training.contrastive.batch_shuffle", lambda x: (x[order], order))
    expected = [module._projections(module.key_tapped, module.key_heads, g)[0] for g in images[order].chunk(4)]
    torch.testing.assert_close(module._keys(images)[0], torch.cat(expected)[order])


@pytest.mark.slow
@pytest.mark.parametrize(("method", "exit_weight"), [("simclr", 1.0), ("moco", 0.0)])
def test_training_makes_neighbours_of_one_class(digits, method, exit_weight):
    encoder, module = build(method, exit_weight=exit_weight, temperature=0.2)
    before = knn(encoder, digits)
    train(module, digits[:900], epochs=20, batch_size=128, progress=False)
    assert knn(encoder, digits) > before + 0.015
    assert not module.training


def test_an_encoder_in_eval_mode_is_trained_in_training_mode(digits):
    encoder, module = build("simclr")
    module.eval()
    before = encoder.block1.norm.running_var.clone()
    train(module, digits[:256], epochs=1, batch_size=128, progress=False)
    assert not torch.equal(encoder.block1.norm.running_var, before)


def test_training_is_reproducible_and_leaves_the_global_generator_alone(digits):
    weights = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        state = torch.get_rng_state()
        encoder, module = build("simclr")
        train(module, digits[:256], epochs=2, batch_size=64, seed=5, progress=False)
        assert torch.equal(torch.get_rng_state(), state)
        weights.append(encoder.block8.conv.weight)
    assert torch.equal(*weights)


def test_exits_take_no_part_without_a_weight():
    _, plain = build("simclr")
    _, aware = build("simclr", exit_weight=1.0)
    assert len(plain.heads) == 1
    assert len(aware.heads) == 1 + len(aware.tapped.descriptors)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("simclr", {"temperature": 0.0}, "temperature must be above 0"),
        ("simclr", {"exit_weight": -1.0}, "exit_weight must be >= 0"),
        ("moco", {"key_momentum": 1.0}, "key_momentum must lie in"),
        ("moco", {"bank": 0}, "bank and groups be >= 1"),
        ("moco", {"tau": 1}, r"method 'moco' has no option 'tau'; it has \['bank', 'exit_weight'"),
        ("byol", {}, r"method must be one of \['distill', 'moco', 'simclr'\]"),
    ],
)
def test_what_cannot_be_trained(method, options, message):
    with pytest.raises(InputError, match=message):
        build(method, **options)


def test_a_graph_that_would_train_as_in_eval_mode_is_refused(digits):
    class Functional(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = torch.nn.Conv2d(1, 4, 3), torch.nn.Conv2d(4, 4, 3)

        def forward(self, x):
            return self.two(F.dropout(self.one(x).relu(), 0.5, self.training)).mean((2, 3))

    tapped = TappedEncoder.build(Functional(), ["one"], digits[:1])
    with pytest.raises(InputError, match=r"calls \['dropout'\] as functions"):
        build_training("simclr", tapped, SMALL)


def test_views_and_optimisers_that_do_not_exist():
    tapped = build("simclr")[1].tapped
    with pytest.raises(InputError, match="views must be 'auto' or one of"):
        build_training("simclr", tapped, SMALL, views="none")
    with pytest.raises(InputError, match="optimizer must be one of"):
        Optimization("adam")
    with pytest.raises(InputError, match="learning_rate must be a number"):
        Optimization(learning_rate=0.0)


def test_negatives_are_gathered_where_processes_may_be_many():
    assert contrastive_loss(0.1).gather_distributed
