"""The cascade equals its slow references: one image at a time, and simulation from stored scores."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from ssl_exit.cascade import run as engine
from ssl_exit.cascade.cascade import finite_images
from ssl_exit.cascade.plan import Plan
from ssl_exit.cascade.run import Run, _Queue
from ssl_exit.data.images import Batch, open_images
from ssl_exit.errors import InputError
from ssl_exit.exits.thresholds import simulate
from ssl_exit.fitting.record import record
from tests.conftest import batches_of


@pytest.fixture
def test_images(rgb_digits):
    return rgb_digits[800:]


def run(clusterer, images, batch_size):
    return clusterer.model_.run(batches_of(images, batch_size), len(images), batch_size)


def closed(cascade):
    """The same cascade with thresholds that let nothing exit."""
    return cascade.at(np.full_like(cascade.thresholds, np.inf))


def test_batched_equals_one_by_one_equals_simulated(fitted, test_images):
    recorded, _ = record(fitted.model_.cascade, batches_of(test_images, 64))
    labels, exits = simulate(recorded, fitted.model_.cascade.thresholds)
    assert len(np.unique(exits)) >= 3  # otherwise equality shows little
    sizes = np.random.default_rng(0).integers(2, 150, size=5).tolist()
    for batch_size in [1, *sizes, len(test_images), 1000]:
        result = run(fitted, test_images, batch_size)
        np.testing.assert_array_equal(result.labels, labels)
        np.testing.assert_array_equal(result.exits, exits)
        np.testing.assert_allclose(result.cost, fitted.model_.plan.costs[exits])


def test_a_batch_that_is_never_compacted_gives_the_same(fitted, test_images, monkeypatch):
    compacted = run(fitted, test_images, 1000)
    asked = []
    monkeypatch.setattr(fitted.model_.plan, "compacting_pays", lambda *args: asked.append(args[1:]))
    result = run(fitted, test_images, 1000)
    assert asked
    assert all(before == len(test_images) > after for before, after in asked)
    for name in ("labels", "exits", "cost"):
        np.testing.assert_array_equal(getattr(result, name), getattr(compacted, name))
    np.testing.assert_allclose(result.scores, compacted.scores, atol=1e-5)
    audit = np.random.default_rng(0).random(len(test_images)) < 0.5
    audited = fitted.model_.run(batches_of(test_images, 1000), len(test_images), 1000, audit)
    np.testing.assert_array_equal(audited.labels, compacted.labels)
    np.testing.assert_array_equal(audited.audited >= 0, audit & (compacted.exits < len(fitted.exit_points_)))


def test_exits_at_which_nothing_leaves_do_no_work(fitted, test_images):
    """Only exits before a live one that builds on them still describe; the last stages run as one."""
    thresholds = np.full_like(fitted.model_.cascade.thresholds, np.inf)
    thresholds[1] = fitted.model_.cascade.thresholds[1]
    cascade = fitted.model_.cascade.at(thresholds)
    plan, batches = Plan(cascade), list(batches_of(test_images, 64))
    some = engine.run(plan, batches, len(test_images), 64)
    assert set(some.exits.tolist()) <= {1, len(fitted.exit_points_)}
    found = plan.segments
    assert [(s.stages, s.exit) for s in found] == [(range(2), 1), (range(2, len(cascade.rules) + 1), None)]
    assert found[0].asked == [1]
    assert found[0].described == ([0, 1] if cascade.tapped.accumulate else [1])
    assert found[1].described == found[1].asked == []
    recorded, _ = record(cascade, batches)
    np.testing.assert_array_equal(some.labels, simulate(recorded, cascade.thresholds)[0])
    own = plan.costs - cascade.costs
    assert own[-1] < 0
    assert Plan(closed(cascade)).costs[-1] == pytest.approx(1)


def test_one_synchronisation_a_run_of_a_segment(fitted, test_images, monkeypatch):
    """On a GPU the host waits where it must know how many go on, and nowhere else."""
    plan = fitted.model_.plan
    waits, calls = [], []
    monkeypatch.setattr(engine, "finite_images", lambda x: x.flatten(1).isfinite().all(1))  # as on a GPU
    nonzero, call = torch.Tensor.nonzero, Plan.call
    monkeypatch.setattr(torch.Tensor, "nonzero", lambda self: waits.append(1) or nonzero(self))
    monkeypatch.setattr(Plan, "call", lambda self, s, *a, **k: calls.append(s.exit) or call(self, s, *a, **k))
    for name in ("item", "tolist", "cpu", "numpy", "__bool__"):
        method = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda self, *a, m=method: waits.append(1) or m(self, *a))
    run_ = Run(plan, len(test_images), 32)
    waits.clear()
    for batch in open_images(test_images).batches(np.arange(len(test_images)), 32):
        run_.push(batch)
    early = [exit_ for exit_ in calls if exit_ is not None]
    assert len(waits) == len(early) > 0


def test_a_single_batch_with_an_unreadable_image_goes_straight_through(fitted, test_images, monkeypatch):
    (batch,) = open_images(test_images[:20]).batches(np.arange(20), 64)
    with_hole = Batch(batch.indices + 1, batch.images, {0: "unreadable"})
    plain = fitted.model_.run([batch], 20, 64)
    monkeypatch.setattr(_Queue, "put", None)
    result = fitted.model_.run([with_hole], 21, 64)
    np.testing.assert_array_equal(result.labels[1:], plain.labels)
    assert result.labels[0] == -1


@pytest.mark.parametrize("audited", [False, True])
def test_a_single_image_comes_out_as_among_others(fitted, test_images, audited):
    """In every field a single image equals the same image in a batch."""
    images = test_images[:60].clone()
    images[3, 0, 2, 2] = torch.nan
    n, audit = len(images) + 1, np.full(len(images) + 1, audited)
    indices = torch.arange(1, n)
    together = fitted.model_.run([Batch(indices, images, {0: "unreadable"})], n, n, audit)
    assert len(np.unique(together.exits)) >= 3
    assert (together.audited >= 0).any() == audited
    one = torch.zeros(1, dtype=torch.int64)
    for i in range(n):
        batch = Batch(one, images[i - 1 : i]) if i else Batch(one[:0], torch.empty(0), {0: "unreadable"})
        found = fitted.model_.run([batch], 1, 64, audit[:1])
        assert found.skipped == ({0: together.skipped[i]} if i in together.skipped else {})
        for name in ("labels", "exits", "scores", "cost", "audited"):
            mine, theirs = getattr(found, name), getattr(together, name)
            assert mine.dtype == theirs.dtype
            np.testing.assert_allclose(mine, theirs[i : i + 1], atol=1e-5)


def test_scores_are_those_of_the_exit_taken(fitted, test_images):
    recorded, _ = record(fitted.model_.cascade, batches_of(test_images, 50))
    result = run(fitted, test_images, 32)
    early = result.exits < len(fitted.exit_points_)
    taken = recorded.scores[np.flatnonzero(early), result.exits[early]]
    np.testing.assert_allclose(result.scores[early], taken, atol=1e-4)
    assert (result.scores[~early] == 1).all()


def test_order_of_input_is_the_order_of_output(fitted, test_images):
    shuffle = np.random.default_rng(1).permutation(len(test_images))
    plain, shuffled = run(fitted, test_images, 48), run(fitted, test_images[shuffle], 48)
    np.testing.assert_array_equal(plain.labels[shuffle], shuffled.labels)
    np.testing.assert_array_equal(plain.exits[shuffle], shuffled.exits)


@pytest.mark.parametrize("batch_size", [16, 200])
def test_stages_compute_survivors_only_and_full_batches(fitted, test_images, batch_size, monkeypatch):
    monkeypatch.setattr(fitted.model_.plan, "cascade", replace(fitted.model_.cascade, times=None))
    rows = [[] for _ in fitted.model_.cascade.tapped.staged.stages]
    hooks = [
        stage.register_forward_pre_hook(lambda _, args, i=i: rows[i].append(len(args[0])))
        for i, stage in enumerate(fitted.model_.cascade.tapped.staged.stages)
    ]
    try:
        result = run(fitted, test_images, batch_size)
    finally:
        for hook in hooks:
            hook.remove()
    for stage, sizes in enumerate(rows):
        assert sum(sizes) == (result.exits >= stage).sum()
        assert max(sizes, default=0) <= batch_size
        assert sum(size < batch_size for size in sizes) <= 1  # all but the flush are full


def test_queues_hold_less_than_two_batches(fitted, test_images, monkeypatch):
    fullest = []
    put = _Queue.put

    def spy(self, *args):
        put(self, *args)
        fullest.append(self.filled)

    monkeypatch.setattr(_Queue, "put", spy)
    for batch_size in (8, 13, 32):
        fullest.clear()
        run(fitted, test_images, batch_size)
        assert 0 < max(fullest) < 2 * batch_size


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("batch_size", [16, 200])
def test_images_that_are_not_finite_never_leave_early_and_are_reported(fitted, test_images, value, batch_size):
    clean = run(fitted, test_images, batch_size)
    broken = test_images.clone()
    broken[[3, 77], 0, 5, 5] = value
    result = run(fitted, broken, batch_size)
    assert sorted(result.skipped) == [3, 77]
    assert (result.labels[[3, 77]] == -1).all()
    assert (result.exits[[3, 77]] == len(fitted.exit_points_)).all()
    assert np.isnan(result.scores[[3, 77]]).all()
    others = np.delete(np.arange(len(broken)), [3, 77])
    np.testing.assert_array_equal(result.labels[others], clean.labels[others])


def test_never_and_always(fitted, test_images):
    cascade = closed(fitted.model_.cascade)
    batches = list(batches_of(test_images, 64))
    full = fitted.model_.run_full(batches, len(test_images), 64).labels
    never = engine.run(Plan(cascade), batches, len(test_images), 64)
    np.testing.assert_array_equal(never.labels, full)
    assert (never.exits == len(fitted.exit_points_)).all()
    np.testing.assert_allclose(never.cost, 1)  # exits at which nothing can leave do no work
    always = Plan(cascade.at(np.zeros_like(cascade.thresholds)))
    assert (engine.run(always, batches, len(test_images), 64).exits == 0).all()


def test_whole_encoder_labels_are_those_of_the_untouched_encoder(fitted, test_images):
    with torch.no_grad():
        features = fitted.encoder(test_images).numpy()
    cosine = features @ fitted.cluster_centers_.T / np.linalg.norm(features, axis=1, keepdims=True)
    np.testing.assert_array_equal(fitted.predict_full(test_images), cosine.argmax(1))


def test_fewer_images_than_promised_are_an_error(fitted, test_images):
    with pytest.raises(InputError, match="200 images came where 210 were promised"):
        fitted.model_.run(batches_of(test_images, 64), 210, 64)


def test_finite_pixels_whose_sum_overflows_are_finite():
    images = torch.rand(6, 3, 8, 8)
    images[1] = 3e38
    images[2, 0, 3, 3] = torch.nan
    images[3, 1, 0, 0] = -torch.inf
    images[4, :, 0, 0], images[4, :, 1, 1] = torch.inf, -torch.inf
    assert finite_images(images).tolist() == [True, True, False, False, False, True]
    assert finite_images(images[:2]).all()
