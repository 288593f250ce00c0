import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ssl_exit.data.images import TensorImages
from ssl_exit.encoders.front import FrontDescriptor, FrontNetwork
from ssl_exit.errors import InputError
from ssl_exit.settings import Front
from ssl_exit.training.front import FrontTraining, leaving_share, sharpened, teach
from ssl_exit.training.views import shifted, with_cuts


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=1, max_size=30), st.sampled_from([0, 0.1, 0.5]))
def test_leaving_share_is_the_largest_share_that_keeps_the_disagreement(images, eps):
    scores = torch.tensor([score / 5 for score, _ in images])
    agrees = torch.tensor([agree for _, agree in images])
    shares = [0.0]
    for threshold in scores.unique():
        leaves = scores >= threshold
        if int((leaves & ~agrees).sum()) <= eps * len(images):
            shares.append(float(leaves.float().mean()))
    agreement, share = leaving_share(scores, agrees, eps)
    assert agreement == pytest.approx(float(agrees.float().mean()))
    assert share == pytest.approx(max(shares))


def test_views_are_shifts_of_the_image_or_of_its_mirror_image():
    torch.manual_seed(0)
    images = torch.rand(20, 2, 12, 16)
    mirror = torch.arange(20) % 2 == 0
    views = shifted(images, 2, mirror)
    padded = F.pad(images, (2, 2, 2, 2), mode="reflect")
    for view, image, flip in zip(views, padded, mirror, strict=True):
        every = [image[:, i : i + 12, j : j + 16] for i in range(5) for j in range(5)]
        assert sum(torch.equal(view, one.flip(-1) if flip else one) for one in every) == 1
    assert not torch.equal(shifted(images, 1), shifted(images, 1))
    assert torch.equal(shifted(images, 0), images)


def test_cuts_are_rectangles_of_another_image():
    torch.manual_seed(0)
    images = torch.arange(40.0)[:, None, None, None].expand(40, 2, 12, 16)
    cut = with_cuts(images, 0.5)
    assert torch.equal(with_cuts(images, 0.0), images)
    assert torch.equal(cut[:, 0], cut[:, 1])
    areas = []
    for own, pixels in enumerate(cut[:, 0]):
        other = pixels != own
        rows, columns = other.any(1), other.any(0)
        assert torch.equal(other, rows[:, None] & columns)
        assert len(pixels[other].unique()) <= 1
        areas.append(float(other.float().mean()))
    assert 0.25 < np.mean(np.array(areas) > 0) < 0.75
    assert max(areas) > 0.4


def test_sharpened_assignments():
    soft = torch.tensor([[0.6, 0.3, 0.1], [1.0, 0.0, 0.0]])
    expected = soft.pow(2) / soft.pow(2).sum(1, keepdim=True)
    assert torch.allclose(sharpened(soft, 2.0), expected)
    assert torch.equal(sharpened(soft, 8.0).argmax(1), soft.argmax(1))


@pytest.fixture(scope="module")
def lesson(digits):
    """Images, and clusters that pixels tell: how bright they are, and whether the upper half is brighter."""
    images = digits[:600]
    up, total = images[:, 0, :4].sum((1, 2)), images.sum((1, 2, 3))
    labels = (up * 2 > total).long() * 2 + (total > total.median()).long()
    return TensorImages(images), labels, F.one_hot(labels, 4).half()


def taught(lesson, folder=None, before=(), answers=None, **how):
    source, labels, targets = lesson
    with torch.random.fork_rng():
        torch.manual_seed(0)
        front = FrontDescriptor(FrontNetwork(1, 8), (1, 8, 8), 8)
    settings = Front("auto", **{"epochs": 6, "patience": 0} | how)
    order, how = np.arange(len(source)), {"max_disagreement": 0.05, "folder": folder, "answers": answers}
    return teach(front, before, source, order, targets, labels, settings, **how)


def same(a, b):
    parts = [(a.front, b.front), (a.rule, b.rule)]
    return all(torch.equal(v, y.state_dict()[k]) for x, y in parts for k, v in x.state_dict().items())


@torch.no_grad()
def logits(one, images):
    return one.rule.logits(one.front(images))


def test_a_front_is_taught_what_is_answered_to_the_view_it_sees(lesson):
    """Here the answer depends on the view alone: which half of it is brighter."""
    source, _, targets = lesson
    asked = []

    def answers(views):
        asked.append(views)
        up = views[:, 0, :4].sum((1, 2)) * 2 > views.sum((1, 2, 3))
        return F.one_hot(up.long(), 4).float()

    one = taught((source, lesson[1], torch.zeros_like(targets)), epochs=15, match=True, answers=answers)
    up = source.images[:, 0, :4].sum((1, 2)) * 2 > source.images.sum((1, 2, 3))
    assert float((logits(one, source.images).argmax(1) == up).float().mean()) > 0.85
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(asked[:5]))


def test_a_front_learns_what_it_is_taught(lesson):
    one, (source, labels, _) = taught(lesson, epochs=15), lesson
    agreement = float((logits(one, source.images).argmax(1) == labels).float().mean())
    most = float(labels.bincount().max() / len(labels))
    assert agreement > most + 0.2
    assert 0.5 < one.agreement <= 1
    assert 0 <= one.saving <= 1
    assert one.epochs == 15
    assert not one.front.training
    assert not any(p.requires_grad for p in one.front.parameters())


def test_teaching_depends_on_the_seed_alone(lesson):
    before = torch.get_rng_state()
    first = taught(lesson)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(7)
    assert same(first, taught(lesson))


class Stop(Exception):
    pass


def test_an_interrupted_teaching_goes_on_from_its_last_epoch(lesson, tmp_path, monkeypatch):
    expected = taught(lesson)
    calls, step = [], FrontTraining.losses

    def interrupted(self, *args):
        calls.append(1)
        if len(calls) > 70:
            raise Stop
        return step(self, *args)

    monkeypatch.setattr(FrontTraining, "losses", interrupted)
    with pytest.raises(Stop):
        taught(lesson, tmp_path)
    monkeypatch.setattr(FrontTraining, "losses", step)
    resumed = taught(lesson, tmp_path)
    assert same(resumed, expected)
    assert resumed.epochs == expected.epochs
    with pytest.raises(InputError, match="written with other settings"):
        taught(lesson, tmp_path, learning_rate=0.1)


def test_teaching_stops_early_where_nothing_is_gained_any_more(lesson):
    assert taught(lesson, epochs=40, patience=2).epochs < 30


def test_a_budget_of_seconds_ends_teaching(lesson):
    one = taught(lesson, epochs=1000, seconds=1.0)
    assert 0 < one.epochs < 1000


def test_a_later_front_builds_on_those_before_it(lesson):
    first = taught(lesson)
    second = taught(lesson, before=[first.front], epochs=2)
    assert second.rule.dim == first.front.dim + second.front.dim
    assert torch.any(second.rule.weight[:, : first.front.dim] != 0)


def test_too_few_images_are_refused(lesson):
    source, labels, targets = lesson
    front = FrontDescriptor(FrontNetwork(1, 8), (1, 8, 8), 8)
    with pytest.raises(InputError, match="cannot be taught by 20 images"):
        teach(front, [], source, np.arange(20), targets, labels, Front("auto"), max_disagreement=0.05)


def test_a_module_of_the_users_is_taught_and_left_unchanged(lesson):
    source, labels, targets = lesson
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU())
    before = {k: v.clone() for k, v in network.state_dict().items()}
    how = Front("module", network=network, epochs=15, learning_rate=0.1)
    one = teach(
        FrontDescriptor(network, (1, 8, 8), 8), [], source, np.arange(600), targets, labels, how, max_disagreement=0.05
    )
    agreement = float((logits(one, source.images).argmax(1) == labels).float().mean())
    assert agreement > float(labels.bincount().max() / len(labels)) + 0.1
    assert all(torch.equal(before[k], v) for k, v in network.state_dict().items())
