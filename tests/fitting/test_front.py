import copy
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ssl_exit import Front, InputError, load
from ssl_exit.data.cache import CachedImages
from ssl_exit.data.images import DatasetImages, open_images
from ssl_exit.encoders.small import digits_encoder
from ssl_exit.encoders.tapped import TappedEncoder
from ssl_exit.exits.thresholds import simulate
from ssl_exit.fitting.front import assign
from ssl_exit.fitting.record import record
from ssl_exit.fitting.sample import Clustering
from ssl_exit.settings import Clusters
from tests.conftest import batches_of, clusterer

HOW = {"n_clusters": 4, "max_disagreement": 0.1, "confidence": 0.5, "batch_size": 64, "holdout": 0.3}


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return digits_encoder().eval()


def fronted(encoder, images, **flat):
    flat = HOW | {"front": "auto", "front_width": 8, "front_epochs": 6, "front_patience": 0} | flat
    return clusterer(encoder, **flat).fit(images)


@pytest.fixture(scope="module")
def fitted(encoder, digits):
    return fronted(encoder, digits[:1000])


def test_images_leave_at_the_front_as_the_simulation_says(fitted, encoder, digits):
    test = digits[1000:]
    result = fitted.run(test)
    recorded, _ = record(fitted.model_.cascade, batches_of(test, 64))
    labels, exits = simulate(recorded, fitted.model_.cascade.thresholds)
    assert fitted.exit_names_ == ["front", "end"]
    assert 0.05 < (result.exits == 0).mean() < 1
    assert np.array_equal(result.labels, labels)
    assert np.array_equal(result.exits, exits)
    one_by_one = [fitted.run(test[i : i + 1]) for i in range(40)]
    assert [int(r.labels[0]) for r in one_by_one] == labels[:40].tolist()
    assert np.array_equal(fitted.predict_full(test), recorded.final)
    front = fitted.model_.fronts[0]
    macs = sum(fitted.model_.cascade.tapped.staged.macs) + fitted.model_.cascade.final.macs
    assert result.cost[result.exits == 0][0] == pytest.approx((front.macs + front.dim * 4) / macs)
    assert result.cost[result.exits == 1][0] == pytest.approx(1 + (front.macs + front.dim * 4) / macs)


def test_final_clusters_are_those_without_a_front(fitted, encoder, digits):
    plain = clusterer(encoder, **HOW).fit(digits[:1000])
    assert np.array_equal(plain.cluster_centers_, fitted.cluster_centers_)
    assert plain.model_.provenance.n_fit == fitted.model_.provenance.n_fit


def test_what_is_assigned_is_what_the_encoder_says(fitted, encoder, digits):
    tapped = TappedEncoder.build(encoder, [], digits[:1]).for_inference("float32", (1, 8, 8))
    images = digits[:300].clone()
    images[7] = torch.nan
    cache = CachedImages(DatasetImages(images, None, 0), (1, 8, 8), 4)
    batches = cache.add(batches_of(images, 50))
    assigned = assign(tapped, batches, 310, Clustering(4), mirror=True)
    with torch.no_grad():
        plain, mirrored = tapped.final_features(images), tapped.final_features(images.flip(-1))
    good = torch.arange(300) != 7
    assert list(assigned.skipped) == [7]
    assert torch.equal(assigned.labels[:300][good], assigned.final(plain)[good])
    assert assigned.labels[300:].eq(-1).all()
    assert assigned.labels[7] == -1
    mean = (assigned.final.soft(plain) + assigned.final.soft(mirrored)) / 2
    assert torch.allclose(assigned.soft[:300].float()[good], mean[good], atol=1e-3)
    with torch.no_grad():
        assert torch.allclose(assigned.answers(tapped)(images[good]), assigned.final.soft(plain)[good], atol=1e-5)
    (batch,) = cache.open().batches(np.arange(100), 100)
    assert torch.allclose(batch.images[good[:100]], F.avg_pool2d(images[:100], 2)[good[:100]], atol=1e-3)
    in_memory = open_images(images)
    assert CachedImages(in_memory, (1, 8, 8), 8).open() is in_memory


def test_a_model_with_a_front_is_saved_pickled_and_copied(fitted, encoder, digits, tmp_path):
    expected = fitted.run(digits[1000:])
    fitted.save(tmp_path / "model")
    loaded = load(tmp_path / "model", encoder=encoder)
    copies = [loaded.model_, pickle.loads(pickle.dumps(fitted.model_)), copy.deepcopy(fitted.model_)]
    for model in copies:
        result = model.run(batches_of(digits[1000:], 64), 797, 64)
        assert np.array_equal(result.labels, expected.labels)
        assert np.array_equal(result.exits, expected.exits)
        assert model.check().void == ""
        assert model.provenance.teaching == fitted.model_.provenance.teaching
    changed = copy.deepcopy(fitted.model_)
    with torch.no_grad():
        next(changed.fronts[0].parameters()).mul_(1.5)
    assert "rules or clusters changed" in changed.check().void


def test_calibration_keeps_the_front(fitted, digits):
    c = copy.deepcopy(fitted)
    c.calibrate(digits[1000:1500], max_disagreement=0.5)
    assert torch.equal(c.model_.fronts[0].network.stem[0].weight, fitted.model_.fronts[0].network.stem[0].weight)
    assert (c.run(digits[1500:]).exits == 0).mean() >= (fitted.run(digits[1500:]).exits == 0).mean()


def test_fits_with_one_seed_are_equal(fitted, encoder, digits):
    again = fronted(encoder, digits[:1000])
    assert np.array_equal(again.model_.cascade.thresholds, fitted.model_.cascade.thresholds)
    assert np.array_equal(again.predict(digits[1000:]), fitted.predict(digits[1000:]))


def test_the_encoder_answers_views_at_full_resolution(encoder, digits):
    """The front sees half of it."""
    c = fronted(encoder, digits[:1000], front_match=True, front_side=4, front_epochs=3)
    assert c.model_.fronts[0].factor == 2
    assert np.mean(c.predict(digits[1000:]) == c.predict_full(digits[1000:])) > 0.5


def test_exits_in_the_encoder_see_what_the_front_saw(encoder, digits):
    c = fronted(encoder, digits[:1000], exits=["block4", "block6"], descriptor="average", front_macs=[0.02, 0.05])
    tapped = c.model_.cascade.tapped
    assert c.exit_names_ == ["front1", "front2", "block4.relu", "block6.relu", "end"]
    assert tapped.seen == [32, 64, 128, 192]
    recorded, _ = record(c.model_.cascade, batches_of(digits[1000:], 64))
    labels, exits = simulate(recorded, c.model_.cascade.thresholds)
    result = c.run(digits[1000:])
    assert np.array_equal(result.labels, labels)
    assert np.array_equal(result.exits, exits)


class Service:
    """An encoder elsewhere: NumPy in, NumPy out."""

    def __init__(self, encoder):
        self.encoder, self.calls = encoder, 0

    def __call__(self, images):
        self.calls += len(images)
        with torch.no_grad():
            return {"pooler_output": self.encoder(torch.from_numpy(images.numpy())).numpy()}


def test_any_callable_is_an_encoder_behind_a_front(fitted, encoder, digits, tmp_path):
    service = Service(encoder)
    c = fronted(service, digits[:1000])
    assert np.allclose(c.cluster_centers_, fitted.cluster_centers_, atol=1e-4)
    service.calls = 0
    result = c.run(digits[1000:])
    assert service.calls == (result.exits == 1).sum() < 797  # only those that stay are sent
    assert 0 < result.cost.min() < result.cost.max()
    c.save(tmp_path / "model")
    loaded = load(tmp_path / "model", encoder=service)
    assert np.array_equal(loaded.predict(digits[1000:]), result.labels)
    assert np.array_equal(loaded.run(digits[1000:]).cost, result.cost)
    with pytest.raises(InputError, match="put a front before it"):
        clusterer(service, **HOW).fit(digits[:500])


def test_a_front_of_the_users(encoder, digits, tmp_path):
    torch.manual_seed(1)
    own = nn.Sequential(nn.Conv2d(1, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten())
    c = clusterer(encoder, **HOW | {"max_disagreement": 0.4})
    c.set_params(front=Front("module", network=own, epochs=4, patience=0))
    result = c.fit(digits[:1000]).run(digits[1000:])
    assert (result.exits == 0).any()
    c.save(tmp_path / "model")
    with pytest.raises(InputError, match="front=that module"):
        load(tmp_path / "model", encoder=encoder)
    loaded = load(tmp_path / "model", encoder=encoder, front=copy.deepcopy(own))
    assert np.array_equal(loaded.predict(digits[1000:]), result.labels)
    assert np.array_equal(
        pickle.loads(pickle.dumps(c.model_)).run(batches_of(digits[1000:], 64), 797).labels, result.labels
    )
    with pytest.raises(InputError, match="does not fit this model"):
        load(tmp_path / "model", encoder=encoder, front=nn.Sequential(nn.Flatten(), nn.Linear(64, 72)))
    with pytest.raises(InputError, match=r"torch\.nn\.Module"):
        clusterer(encoder, **HOW, front="module").fit(digits[:500])


def test_classes_are_taught_in_the_supervised_mode(digits):
    from sklearn.datasets import load_digits

    torch.manual_seed(0)
    encoder = nn.Sequential(digits_encoder(), nn.Linear(128, 10)).eval()
    targets = load_digits().target
    c = clusterer(encoder, **HOW | {"n_clusters": 10}, supervised=True, front="auto", front_width=16, front_epochs=20,
                  front_mirror=False).fit(digits[:1000], targets[:1000])  # fmt: skip
    recorded, _ = record(c.model_.cascade, batches_of(digits[1000:], 64))
    assert (recorded.labels[:, 0] == targets[1000:]).mean() > 0.5  # the encoder itself knows nothing


def test_evaluation_says_when_teaching_has_paid_for_itself(fitted, digits):
    evaluation = fitted.evaluate(digits[1000:])
    seconds = sum(one.seconds for one in fitted.model_.provenance.teaching)
    assert evaluation.teaching_seconds == seconds > 0
    saved = 1 / evaluation.images_per_second_full - 1 / evaluation.images_per_second
    assert evaluation.break_even == (pytest.approx(seconds / saved) if saved > 0 else float("inf"))


@pytest.mark.parametrize(
    ("front", "message"),
    [
        ("large", r"kind \(--front\) must be one of"),
        ({"macs": 0.0}, "macs"),
        ({"macs": [0.1, 2.0]}, r"shares in \(0, 1\)"),
        ({"epochs": 0}, "epochs"),
        ({"sharpness": 0.0}, "sharpness"),
        ({"folder": 3}, "folder"),
    ],
)
def test_nonsense_is_refused(front, message):
    with pytest.raises(InputError, match=message):
        Front(front) if isinstance(front, str) else Front("auto", **front)


def test_what_cannot_be_is_refused_before_anything_is_taught(encoder, digits, monkeypatch):
    monkeypatch.setattr("ssl_exit.training.front.train", None)
    with pytest.raises(InputError, match="patience 2 lets nothing leave at 1 exits"):
        fronted(encoder, digits[:500], patience=2)
    with pytest.raises(InputError, match="'front' does not exist"):
        clusterer(encoder, **HOW, rule="front").fit(digits[:500])
    with pytest.raises(InputError, match="no exit point"):
        clusterer(encoder, **HOW, exits=[]).fit(digits[:500])
    with pytest.raises(InputError, match="'nope' names no node"):
        fronted(encoder, digits[:500], exits=["nope"])
    with pytest.raises(InputError, match="cannot accumulate"):
        fronted(
            encoder, digits[:500], exits=["block1", "block2", "block3"], descriptor="flatten", front_macs=[0.02, 0.05]
        )


def test_calibrating_follows_a_front_whose_weights_changed(fitted, encoder, digits, tmp_path):
    c = copy.deepcopy(fitted)
    with torch.no_grad():
        for p in c.model_.fronts[0].parameters():
            p.mul_(-0.5)
    assert c.certificate_.void
    c.calibrate(digits[1000:1500])
    assert not c.certificate_.void
    c.save(tmp_path / "model")
    assert np.array_equal(load(tmp_path / "model", encoder=encoder).predict(digits[1500:]), c.predict(digits[1500:]))


def test_a_front_that_works_in_place_changes_nothing_for_the_encoder(encoder, digits):
    class InPlace(nn.Module):
        def forward(self, x):
            return x.sub_(0.5).mul_(3).flatten(1)

    images = digits[:1000].clone()
    c = clusterer(encoder, **HOW)
    c.set_params(front=Front("module", network=InPlace(), epochs=3, patience=0)).fit(images)
    assert torch.equal(images, digits[:1000])
    recorded, _ = record(c.model_.cascade, batches_of(digits[1000:], 64))
    assert np.array_equal(recorded.final, c.predict_full(digits[1000:]))
    assert np.array_equal(c.run(digits[1000:]).labels, simulate(recorded, c.model_.cascade.thresholds)[0])


def test_an_interrupted_fit_goes_on_with_what_it_had_taught(fitted, encoder, digits, tmp_path, monkeypatch):
    class Stop(Exception):
        pass

    def stop(*args, **kwargs):
        raise Stop

    folder = str(tmp_path / "front")
    monkeypatch.setattr("ssl_exit.fitting.fit.calibrate", stop)
    with pytest.raises(Stop):
        fronted(encoder, digits[:1000], front_folder=folder)
    monkeypatch.undo()
    monkeypatch.setattr("ssl_exit.training.front.FrontTraining.losses", stop)  # nothing is left to teach
    again = fronted(encoder, digits[:1000], front_folder=folder, front_width=None)  # the width is in the checkpoint
    assert np.array_equal(again.model_.cascade.thresholds, fitted.model_.cascade.thresholds)
    with pytest.raises(InputError, match="written with other settings"):
        fronted(encoder, digits[:1000], front_folder=folder, n_clusters=5)


def test_an_encoder_without_countable_work_and_without_a_front(digits):
    c = clusterer([nn.AvgPool2d(2), nn.AvgPool2d(2), nn.Flatten()], **HOW, exits=["stage0"]).fit(digits[:500])
    assert c.predict(digits[500:]).shape == (1297,)


def test_soft_assignments_do_not_depend_on_the_batch(encoder, digits):
    tapped = TappedEncoder.build(encoder, [], digits[:1]).for_inference("float32", (1, 8, 8))
    euclidean = Clusters(spherical=False)
    one, other = (
        assign(tapped, batches_of(digits[:200], size), 200, Clustering(4, euclidean)).soft for size in (200, 7)
    )
    assert torch.allclose(one.float(), other.float(), atol=2e-3)
