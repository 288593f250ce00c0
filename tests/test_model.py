"""A fitted model is a value: it is copied, pickled and sent to other processes with identical answers."""

import copy
import pickle
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import FrozenInstanceError, replace
from multiprocessing import get_context

import cloudpickle
import joblib
import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from ssl_exit.encoders.small import digits_encoder
from tests import conftest


@pytest.fixture(scope="module")
def c(digits):
    torch.manual_seed(0)
    settings = {"n_clusters": 5, "max_disagreement": 0.2, "confidence": 0.5, "audit": 0.1}
    return conftest.clusterer(digits_encoder(), **settings).fit(digits[:900])


def by_joblib(value, folder):
    joblib.dump(value, folder / "value.joblib")
    return joblib.load(folder / "value.joblib")


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "cloudpickle", "joblib"])
@pytest.mark.parametrize("of_model", [True, False])
def test_copies_answer_alike(c, digits, tmp_path, way, of_model):
    ways = {
        "deepcopy": copy.deepcopy,
        "pickle": lambda value: pickle.loads(pickle.dumps(value)),
        "cloudpickle": lambda value: pickle.loads(cloudpickle.dumps(value)),
        "joblib": lambda value: by_joblib(value, tmp_path),
    }
    images, n = digits[900:], len(digits) - 900
    if of_model:
        one, two = c.model_, ways[way](c.model_)
        results = [model.run(conftest.batches_of(images, 64), n, 64) for model in (one, two)]
    else:
        one, two = copy.copy(c), ways[way](c)
        one._hold(one.model_)
        two._hold(two.model_)
        results = [each.run(images) for each in (one, two)]
        assert two.certificate_ == one.certificate_
        assert two.certificate_.void == ""
    for name in ("labels", "exits", "scores", "cost", "audited"):
        np.testing.assert_array_equal(getattr(results[0], name), getattr(results[1], name))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet20", "mobilenet", "vit"])
def test_every_kind_of_encoder_is_pickled(name, rgb_digits):
    encoder = conftest.untrained(name, rgb_digits)
    settings = {"n_clusters": 3, "max_disagreement": 0.3, "confidence": 0.5}
    model = conftest.clusterer(encoder, **settings).fit(rgb_digits[:300]).model_
    again = pickle.loads(pickle.dumps(model))
    one, two = (m.run(conftest.batches_of(rgb_digits[300:400], 64), 100, 64) for m in (model, again))
    np.testing.assert_array_equal(one.labels, two.labels)
    np.testing.assert_array_equal(one.exits, two.exits)


def labels_of(model, images):
    return model.run(conftest.batches_of(images, 64), len(images), 64).labels


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_worker_process_answers_alike(c, digits, method):
    model, images = c.model_, digits[900:1100]
    with ProcessPoolExecutor(1, mp_context=get_context(method)) as pool:
        labels = pool.submit(labels_of, model, images).result(timeout=240)
    np.testing.assert_array_equal(labels, labels_of(model, images))


def test_it_cannot_be_changed_in_place(c):
    with pytest.raises(FrozenInstanceError):
        c.model_.path = None
    with pytest.raises(FrozenInstanceError):
        c.model_.cascade.times = None
    with pytest.raises(ValueError, match="read-only"):
        c.model_.cascade.thresholds[0] = 0.5


def test_weights_are_hashed_once_while_they_stay(c, monkeypatch):
    hashed = []
    whole = c.certificate_.issued_for["encoder"]
    monkeypatch.setattr("ssl_exit.data.hashes.module_hash", lambda module: hashed.append(1) or whole)
    for _ in range(3):
        assert c.certificate_.void == ""
    assert not hashed
    with torch.no_grad():
        next(c.encoder_.parameters()).add_(0)
    assert c.certificate_.void == ""
    assert len(hashed) == 1  # a new version: looked at once


PROGRAM = """
import sys, torch
before = (torch.get_num_threads(), torch.backends.mha.get_fastpath_enabled(), torch.get_float32_matmul_precision())
import numpy, random, warnings
import sklearn.linear_model  # draws from Python's generator when it is imported
from ssl_exit import ExitClusterer, Runtime, load
filters, numpy_state, state = list(warnings.filters), numpy.random.get_state()[1].copy(), torch.get_rng_state()
python = random.getstate()
images = torch.randn(300, 3, 12, 12, generator=torch.Generator().manual_seed(0))
encoder = torch.nn.Sequential(*(torch.nn.Conv2d(3, 3, 3) for _ in range(4)))
state = torch.get_rng_state()
c = ExitClusterer(encoder, 3, rule="mlp", max_disagreement=0.4, confidence=0.5, runtime=Runtime(progress=False))
c.set_params(rule__options={"epochs": 1})
c.fit(images).predict(images)
c.save(sys.argv[1])
load(sys.argv[1], encoder).evaluate(images)
after = (torch.get_num_threads(), torch.backends.mha.get_fastpath_enabled(), torch.get_float32_matmul_precision())
assert before == after
assert torch.equal(torch.get_rng_state(), state)
assert (numpy.random.get_state()[1] == numpy_state).all()
assert random.getstate() == python
mine = [f for f in warnings.filters if f not in filters and "ssl_exit" in str(f)]
assert not mine, mine
assert not [m for m in ("lightly", "pytorch_lightning", "matplotlib") if m in sys.modules]
"""


@pytest.mark.slow
def test_nothing_reaches_into_the_host(tmp_path):
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", PROGRAM, str(tmp_path / "model")], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


def test_importing_loads_nothing_slow():
    names = ("lightly", "pytorch_lightning", "matplotlib", "scipy.optimize", "torch._inductor", "torchvision", "faiss")
    program = f"import sys, torch, ssl_exit; print([m for m in {names} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    light = (
        "import sys; from ssl_exit.cli import main; main(['--help']); print([m for m in ['torch'] if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", light], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("[]")


def test_a_model_may_hold_any_module(rgb_digits):
    """replace() makes another value; the first stays as it is."""
    encoder = nn.Sequential(torchvision.ops.Conv2dNormActivation(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3))
    c = conftest.clusterer(encoder.eval(), n_clusters=2, max_disagreement=0.4, confidence=0.5).fit(rgb_digits[:200])
    closed = c.model_.cascade.at(np.full_like(c.model_.cascade.thresholds, np.inf))
    other = replace(c.model_, cascade=closed)
    assert len(other.plan.segments) == 1
    assert (other.run(conftest.batches_of(rgb_digits[:50], 16), 50, 16).exits == len(c.exit_points_)).all()


RULE = """
import sys, pickle, torch
sys.path.insert(0, sys.argv[2])
if sys.argv[3] == "write":
    from mine import Nearest
    from ssl_exit import ExitClusterer, Runtime
    encoder = torch.nn.Sequential(*(torch.nn.Conv2d(3, 3, 3) for _ in range(4)))
    images = torch.randn(300, 3, 12, 12)
    c = ExitClusterer(encoder, 3, rule="nearest", max_disagreement=0.4, confidence=0.5, runtime=Runtime(progress=False))
    with open(sys.argv[1], "wb") as f:
        pickle.dump(c.fit(images), f)
else:
    with open(sys.argv[1], "rb") as f:
        assert len(pickle.load(f).predict(torch.randn(20, 3, 12, 12))) == 20
"""


@pytest.mark.slow
def test_a_rule_of_the_users_travels_with_the_model(tmp_path):
    """Another process imports the module that defines it."""
    (tmp_path / "mine.py").write_text(
        "from ssl_exit.exits.means import EuclideanRule\n\n\nclass Nearest(EuclideanRule):\n    name = 'nearest'\n"
    )
    for task in ("write", "read"):
        words = [sys.executable, "-W", "ignore", "-c", RULE, str(tmp_path / "c.pickle"), str(tmp_path), task]
        done = subprocess.run(words, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
