"""Self-distillation: targets and loss against slow references, rounds, and what it does for early exits."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ssl_exit.data.images import TensorImages
from ssl_exit.data.preprocessing import Preprocessing
from ssl_exit.encoders.small import digits_encoder
from ssl_exit.encoders.tapped import TappedEncoder
from ssl_exit.errors import InputError
from ssl_exit.exits.eenet import cost_aware_loss
from ssl_exit.settings import Optimization
from ssl_exit.training.methods import build_training
from ssl_exit.training.run import seeded, train
from tests.conftest import clusterer

SMALL = Preprocessing(8, (0.0,), (1.0,))
HOW = Optimization("adamw", 1e-3, weight_decay=1e-4, schedule="one_cycle")


@pytest.fixture(scope="module")
def weights(digits):
    """Of a digits encoder after a little SimCLR."""
    with seeded(0):
        encoder = digits_encoder()
        tapped = TappedEncoder.build(encoder, "auto", digits[:1])
        module = build_training("simclr", tapped, SMALL, views="drawing", optimization=HOW)
    train(module, digits[:900], epochs=10, progress=False)
    return encoder.state_dict()


def build(weights, **options):
    with seeded(1):
        encoder = digits_encoder()
        encoder.load_state_dict(weights)
        tapped = TappedEncoder.build(encoder, "auto", torch.zeros(1, 1, 8, 8))
        return encoder, build_training("distill", tapped, SMALL, views="drawing", optimization=HOW, options=options)


def begun(weights, digits, **options):
    encoder, module = build(weights, **options)
    module.attach(TensorImages(digits[:700], pixels=True), np.arange(100, 700), 0)
    module._begin_round()
    return encoder, module


@pytest.mark.parametrize(("mirror", "neighbours", "sharpness"), [(True, 1, 1.0), (False, 1, 2.0), (True, 7, 3.0)])
def test_targets_are_the_teachers_answers(weights, digits, mirror, neighbours, sharpness):
    encoder, module = begun(weights, digits, temperature=0.2, mirror=mirror, neighbours=neighbours, sharpness=sharpness)
    with torch.no_grad():
        features = F.normalize(encoder.eval()(digits[100:700]), dim=1)
        mirrored = F.normalize(encoder(digits[100:700].flip(3)), dim=1)
    answers = [(z @ module.centroids.T / 0.2).softmax(1) for z in ([features, mirrored] if mirror else [features])]
    each = sum(answers) / len(answers)
    for i in (100, 399, 699):
        near = sorted(range(600), key=lambda j: -float(features[j] @ features[i - 100]))[:neighbours]
        mean = sum(each[j] for j in near) / neighbours
        expected = mean**sharpness / (mean**sharpness).sum()
        torch.testing.assert_close(module.targets[i], expected, atol=1e-4, rtol=1e-3)
    assert (module.targets[:100] == 0).all()
    torch.testing.assert_close(module.centroids.norm(dim=1), torch.ones(10))


@pytest.mark.parametrize(("exit_loss", "mutual"), [("soft", 0.0), ("soft", 0.4), ("eenet", 0.0), ("none", 0.4)])
def test_the_loss_is_its_equation(weights, digits, exit_loss, mutual):
    _, module = begun(weights, digits, exit_loss=exit_loss, final_weight=3.0, final_temperature=0.3, mutual=mutual)
    module.eval()
    rows = torch.tensor([150, 300, 450, 600])
    target, images = module.on_before_batch_transfer((rows, digits[rows]), 0)
    assert torch.equal(target, module.targets[rows])
    found = module.losses(target, [images])
    described, output = module.tapped(digits[rows])
    prototypes = module.centroids - module.centroids.mean(0)
    logits = F.cosine_similarity(output[:, None], prototypes[None], dim=2) / 0.3
    outputs = [h(described[:, c]) for h, c in zip(module.heads, module.tapped.columns, strict=False)]
    softened = target
    if outputs:
        mean = sum(z[:, :10].softmax(1) for z in outputs) / len(outputs)
        softened = (1 - mutual) * target + mutual * mean**3 / (mean**3).sum(1, keepdim=True)
    final = -(softened * logits.log_softmax(1)).sum(1).mean()
    if exit_loss == "soft":
        exits = sum(-(target * z.log_softmax(1)).sum(1).mean() for z in outputs) / len(outputs)
    if exit_loss == "eenet":
        label = target.argmax(1)
        y = [z[:, :10].softmax(1)[range(4), label] for z in outputs]
        h = [z[:, 10].sigmoid() for z in outputs]
        end = logits.softmax(1)[range(4), label]
        exits = cost_aware_loss(y, h, end, module.costs, 1.0) / len(outputs)
    expected = final if exit_loss == "none" else 3 * final + exits
    torch.testing.assert_close(found["loss"], expected, atol=1e-4, rtol=1e-4)


def test_the_first_half_of_a_round_trains_answers_alone(weights, digits):
    _, module = begun(weights, digits, exit_loss="eenet", temperature=0.1)
    module.eval()
    module.answers_alone = True
    rows = torch.tensor([150, 300])
    found = module.losses(module.targets[rows], [digits[rows]])
    described, _ = module.tapped(digits[rows])
    outputs = [h(described[:, c])[:, :10] for h, c in zip(module.heads, module.tapped.columns, strict=False)]
    each = [-(module.targets[rows] * z.log_softmax(1)).sum(1).mean() for z in outputs]
    torch.testing.assert_close(found["exits"], sum(each) / len(each), atol=1e-4, rtol=1e-4)


def test_the_temperature_is_that_at_which_views_are_foretold_best(weights, digits):
    encoder, module = begun(weights, digits)
    with torch.no_grad():
        cosines = F.normalize(encoder.eval()(digits[100:700]), dim=1) @ module.centroids.T
        views = [F.normalize(encoder(module.views(digits[100:700])), dim=1) @ module.centroids.T for _ in range(10)]

    def loss(temperature: float) -> float:
        log_p = (cosines / temperature).log_softmax(1)
        return sum(F.nll_loss(log_p, z.argmax(1)).item() for z in views)

    t = module.temperature.item()
    assert loss(t) < min(loss(t / 1.7), loss(t * 1.7))
    assert begun(weights, digits, temperature=0.2)[1].temperature.item() == pytest.approx(0.2)


def test_cost_aware_loss_by_hand():
    y, h, end = [torch.tensor([0.5])], [torch.tensor([0.25])], torch.tensor([0.9])
    costs = torch.tensor([0.2, 1.0])
    expected = -np.log(0.25 * 0.5 + 0.75 * 0.9) + 2.0 * (0.25 * 0.2 + 0.75 * 1.0)
    assert cost_aware_loss(y, h, end, costs, 2.0).item() == pytest.approx(expected, rel=1e-6)


def test_clusters_keep_their_numbers_from_round_to_round(weights, digits):
    _, module = begun(weights, digits)
    before, targets = module.centroids.clone(), module.targets.clone()
    module.seed = 5  # k-means would number clusters otherwise
    with torch.no_grad():
        for p in module.tapped.parameters():
            p.add_(1e-3 * torch.randn_like(p))
    module._begin_round()
    assert not torch.equal(module.centroids, before)
    assert (module.targets[100:].argmax(1) == targets[100:].argmax(1)).float().mean() > 0.7


def test_a_new_round_has_a_new_teacher(weights, digits):
    _, module = build(weights, rounds=2)
    train(module, digits[:700], epochs=4, batch_size=100, progress=False)
    teacher, student = module.teacher.state_dict(), module.tapped.state_dict()
    first = build(weights)[1].tapped.state_dict()
    name = next(n for n in teacher if n.endswith("conv.weight"))
    assert not torch.equal(teacher[name], first[name])  # of round 2: the student after two epochs
    assert not torch.equal(teacher[name], student[name])


@pytest.mark.slow
def test_exits_become_cheaper(weights, digits):
    """At 95 to 99 % agreement on test images, with rules fitted afterwards in both cases."""
    costs = {}
    for name in ("before", "after"):
        encoder, module = build(
            weights, mirror=False, neighbours=10, final_temperature=0.2
        )  # few images, no photographs
        if name == "after":
            train(module, digits[:900], epochs=20, batch_size=100, progress=False)
        exits = [point.name for point in module.tapped.staged.exit_points]
        c = clusterer(encoder, exits=exits, holdout=0).fit(digits[:900])
        c.calibrate(digits[900:1350])
        cost, agreement = c.trade_off(digits[1350:])
        costs[name] = np.mean([cost[agreement >= asked].min() for asked in (0.95, 0.98, 0.99)])
    assert costs["after"] < costs["before"] - 0.01


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exit_loss": "hard"}, "exit_loss must be one of"),
        ({"hidden": 0}, "hidden, neighbours >= 1"),
        ({"rounds": 0}, "hidden, neighbours >= 1"),
        ({"neighbours": 0}, "hidden, neighbours >= 1"),
        ({"mutual": 1.0}, "mutual must lie in"),
        ({"temperature": 0.0}, "sharpness > 0"),
        ({"sharpness": 0.0}, "sharpness > 0"),
    ],
)
def test_what_cannot_be_distilled(weights, options, message):
    with pytest.raises(InputError, match=message):
        build(weights, **options)


def test_more_rounds_than_epochs(weights, digits):
    with pytest.raises(InputError, match="3 rounds do not fit into 2 epochs"):
        train(build(weights, rounds=3)[1], digits[:300], epochs=2, progress=False)


def test_images_that_mean_something_else_in_a_mirror_are_not_flipped(weights):
    _, module = build(weights)
    for mirror, flip in ((True, 0.5), (False, 0.0)):
        assert build_training("distill", module.tapped, SMALL, options={"mirror": mirror}).views.flip == flip
