"""On a CUDA device answers are those of the CPU, but for images next to a threshold or between two clusters."""

import pickle

import numpy as np
import pytest
import torch

from ssl_exit import load
from tests.conftest import clusterer, leaving_everywhere, untrained

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
ROUNDING = 0.98  # share of answers that equal: convolutions differ in their last digits from shape to shape
OPTIONS = {"n_clusters": 5, "max_disagreement": 0.2, "confidence": 0.5, "batch_size": 64}


@pytest.fixture(scope="module", params=["resnet20", "mobilenet", "vit"])
def on_cuda(request, rgb_digits):
    c = clusterer(untrained(request.param, rgb_digits), **OPTIONS, device="cuda").fit(rgb_digits[:800])
    return leaving_everywhere(c, rgb_digits[:800])


def same(one, other) -> float:
    return float(np.mean((one.labels == other.labels) & (one.exits == other.exits)))


def test_a_saved_model_answers_alike_on_both(on_cuda, rgb_digits, tmp_path):
    images = rgb_digits[800:]
    on_cuda.save(tmp_path / "model")
    result = on_cuda.run(images)
    assert len(np.unique(result.exits)) >= 2
    on_cpu = load(tmp_path / "model", on_cuda.encoder, device="cpu")
    assert same(result, on_cpu.run(images)) >= ROUNDING
    assert np.mean(on_cpu.predict_full(images) == on_cuda.predict_full(images)) >= ROUNDING
    far = np.linalg.norm(on_cpu.embed(images) - on_cuda.embed(images), axis=1)
    assert np.median(far / np.linalg.norm(on_cpu.embed(images), axis=1)) < 0.02


def test_batched_streamed_and_one_by_one(on_cuda, rgb_digits):
    images = rgb_digits[800:]
    result = on_cuda.run(images)
    streamed = np.concatenate([part.labels for part in on_cuda.stream(iter(images))])
    assert np.mean(streamed == result.labels) >= ROUNDING
    singles = [on_cuda.run(image[None]) for image in images[:60]]
    assert np.mean([one.labels[0] == label for one, label in zip(singles, result.labels, strict=False)]) >= 0.95
    assert same(on_cuda.run(images.cuda()), result) >= ROUNDING


def test_compiled_with_cuda_graphs(on_cuda, rgb_digits):
    plain = on_cuda.run(rgb_digits)
    c = clusterer(on_cuda.encoder, **OPTIONS, device="cuda", compile=True).fit(rgb_digits[:800])
    c = leaving_everywhere(c, rgb_digits[:800])
    compiled = c.run(rgb_digits)
    assert c.model_.plan.compiled
    assert same(compiled, plain) >= 0.9  # two fits


def test_bfloat16(rgb_digits):
    c = clusterer(untrained("resnet20", rgb_digits), **OPTIONS, device="cuda", precision="bfloat16").fit(
        rgb_digits[:800]
    )
    assert c.evaluate(rgb_digits[800:]).agreement_float32 >= 0.8


def test_a_pickled_clusterer_answers_alike(on_cuda, rgb_digits):
    c = pickle.loads(pickle.dumps(on_cuda))
    np.testing.assert_array_equal(c.predict(rgb_digits[800:]), on_cuda.predict(rgb_digits[800:]))


def test_a_front_is_taught_and_runs_on_it(rgb_digits):
    encoder = untrained("resnet20", rgb_digits)
    c = clusterer(encoder, **OPTIONS, device="cuda", front="auto", front_epochs=10, front_time=0.9)
    c.fit(rgb_digits[:800])
    result = c.run(rgb_digits[800:])
    assert (result.exits == 0).any()
    assert np.mean(result.labels == c.predict_full(rgb_digits[800:])) >= 0.6
    assert c.evaluate(rgb_digits[800:]).cost_time > 0
