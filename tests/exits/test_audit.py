"""The drift audit: wealth against a slow reference, false alarms over long streams, how soon it finds a drift."""

import numpy as np
import pytest
import torch

from ssl_exit.errors import InputError
from ssl_exit.exits.audit import BETS, BLOCK, DriftAudit
from tests.conftest import batches_of, clusterer
from tests.test_clusterer import CIFAR


def stream(rng, n, risk, share):
    """Which of n images are audited and disagree; all of them leave early."""
    return rng.uniform(size=n) < share, rng.uniform(size=n) < risk


def slow_wealth(audited, disagree, eps, share):
    """Wealth after every image: all bets, begun at every block, one by one."""
    path, blocks = [], len(audited) // BLOCK + 1
    wealth = np.array([[1 / ((j + 1) * (j + 2))] * len(BETS) for j in range(blocks)])
    for t, (a, d) in enumerate(zip(audited, disagree, strict=True)):
        y = (a and d) / share
        for j in range(min(blocks, t // BLOCK + 1)):
            wealth[j] *= [1 + bet * share * (y - eps) for bet in BETS]
        later = 1 - sum(1 / ((j + 1) * (j + 2)) for j in range(blocks))
        path.append(wealth.sum(0).mean() + later)
    return np.array(path)


def test_wealth_equals_a_slow_reference_however_images_arrive():
    rng = np.random.default_rng(0)
    audited, disagree = stream(rng, 1700, 0.04, 0.3)
    expected = slow_wealth(audited, disagree, 0.02, 0.3)
    for size in (1, 7, 640, 1700):
        audit = DriftAudit(0.02, 0.3, false_alarm=0.999 / expected.max())
        for at in range(0, 1700, size):
            audit.update(audited[at : at + size], disagree[at : at + size])
        assert audit.evidence == pytest.approx(expected.max())
        assert audit.alarm is None
    audit = DriftAudit(0.02, 0.3, false_alarm=1 / expected[900])
    audit.update(audited, disagree)
    assert audit.alarm == int(np.argmax(expected >= expected[900] * (1 - 1e-12))) + 1
    assert (audit.images, audit.audited, audit.disagreements) == (1700, audited.sum(), (audited & disagree).sum())


@pytest.mark.slow
def test_false_alarms_are_rare_over_long_streams():
    """At exactly the certified rate, over 20,000 images each."""
    rng = np.random.default_rng(0)
    alarms, streams = 0, 300
    for _ in range(streams):
        audit = DriftAudit(0.02, 0.1, false_alarm=0.1)
        audit.update(*stream(rng, 20_000, 0.02, 0.1))
        alarms += audit.alarm is not None
    assert alarms <= 0.1 * streams + 3 * np.sqrt(0.09 * streams)


@pytest.mark.parametrize("calm", [0, 10_000])
def test_a_drift_is_found(calm):
    """From 1 % to 10 % where 2 % was certified, one in ten audited: within 4,000 images, also after a calm."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        audit = DriftAudit(0.02, 0.1)
        audit.update(*stream(rng, calm, 0.01, 0.1))
        assert audit.alarm is None
        assert "no drift found" in str(audit)
        audit.update(*stream(rng, 4000, 0.1, 0.1))
        assert audit.alarm is not None
        assert "agreement has fallen below what was certified" in str(audit)


def test_what_cannot_be_audited():
    for wrong in ((0.0, 0.1, 0.1), (0.02, 0.0, 0.1), (0.02, 1.1, 0.1), (0.02, 0.1, 1.0)):
        with pytest.raises(InputError, match="an audit needs"):
            DriftAudit(*wrong)


@pytest.fixture(scope="module")
def images(cifar):
    """Of all classes, in random order."""
    return cifar[0][torch.from_numpy(np.random.default_rng(0).permutation(2000))]


@pytest.fixture(scope="module")
def audited(simclr_spec, images):
    """A clusterer of real images that audits a fifth; fitted to 1,500 of them."""
    c = clusterer(simclr_spec, CIFAR, n_clusters=4, max_disagreement=0.1, audit=0.2, holdout=0.4)
    return c.fit(images[:1500])


def test_auditing_changes_no_label_and_costs_what_it_says(audited, images):
    images = images[1500:1900]
    audited._hold(audited.model_)
    plain = audited.model_.run(batches_of(CIFAR(images), audited.batch_size), 400)
    found = audited.run(images)
    for name in ("labels", "exits", "scores"):
        np.testing.assert_array_equal(getattr(found, name), getattr(plain, name))
    taken = found.audited >= 0
    early = found.exits < len(audited.exit_points_)
    assert not (taken & ~early).any()
    assert 0.1 < taken.sum() / early.sum() < 0.3
    np.testing.assert_array_equal(found.audited[taken], audited.predict_full(images)[taken])
    np.testing.assert_allclose(found.cost, np.where(taken, audited.model_.plan.costs[-1], plain.cost))
    assert audited.audit_.images == 400
    assert audited.audit_.audited == taken.sum()
    assert audited.audit_.disagreements == (found.audited != found.labels)[taken].sum()
    assert (audited.run(images).audited >= 0).tolist() != taken.tolist()  # drawn anew in every call


def test_clean_images_raise_no_alarm_and_noise_does(audited, images, recwarn):
    audited._hold(audited.model_)
    clean = images[1500:]
    for _ in range(5):
        audited.predict(clean)
    assert audited.audit_.alarm is None
    assert not [w for w in recwarn if "agreement has fallen" in str(w.message)]
    grain = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    noisy = (clean + 25 * grain).clamp(0, 255).byte()
    with pytest.warns(UserWarning, match="agreement has fallen below what was certified") as told:
        audited.predict(torch.cat([noisy] * 4))
    audited.predict(noisy)
    assert len([w for w in (*told, *recwarn) if "agreement has fallen" in str(w.message)]) == 1
    assert 2500 < audited.audit_.alarm < 4500


def test_images_of_a_call_are_taken_in_random_order(audited, images):
    """A folder comes class by class, and classes disagree more or less: in order, that would look like a drift."""
    by_cluster = images[1500:][torch.from_numpy(np.argsort(audited.predict_full(images[1500:]), kind="stable"))]
    audited._hold(audited.model_)
    shuffled = []
    audited.audit_.update = lambda audited, disagree: shuffled.append(disagree)
    found = audited.run(by_cluster)
    expected = (found.audited != found.labels).tolist()
    assert shuffled[0].tolist() != expected
    assert sorted(shuffled[0].tolist()) == sorted(expected)
