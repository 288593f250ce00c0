"""Fits merge: however images are divided among shards, and in whichever order these come."""

from functools import reduce
from operator import add

import numpy as np
import pytest
import torch

from ssl_exit.cascade.plan import Plan
from ssl_exit.cascade.run import run
from ssl_exit.cascade.times import StageTimes
from ssl_exit.encoders.tapped import TappedEncoder
from ssl_exit.exits.across import AcrossExits
from ssl_exit.exits.certificate import SettingCounts
from ssl_exit.exits.registry import build_rules
from ssl_exit.fitting.calibrate import certify_path, shape_path
from ssl_exit.fitting.count import collected, count
from ssl_exit.fitting.record import record, record_logits
from ssl_exit.fitting.sample import final_clusters, sample
from ssl_exit.settings import Settings
from tests.conftest import batches_of, untrained

SETTINGS = Settings(n_clusters=4, max_disagreement=0.2, confidence=0.8)
SAMPLE = 200


@pytest.fixture(scope="module")
def tapped(rgb_digits):
    exits = ["layer1", "layer2", "layer3.0"]
    built = TappedEncoder.build(untrained("resnet20", rgb_digits), exits, rgb_digits[:1], descriptor="average")
    return built.for_inference("float32", (3, 32, 32))


def fit(tapped, images, n_shards, seed):
    """Everything that a fit on shards of the images comes to; the images of a step in random order."""
    torch.manual_seed(seed)

    def shards(part):
        shuffled = images[part][torch.randperm(len(images[part]))]
        pieces = shuffled.tensor_split(n_shards)
        return [batches_of(pieces[i], 50) for i in torch.randperm(n_shards)]

    merged = reduce(lambda a, b: (a + b).lowest(SAMPLE), [sample(tapped, b, SAMPLE) for b in shards(slice(400))])
    final = final_clusters(merged, SETTINGS.n_clusters, SETTINGS.clusters, seed=0)
    statistics = reduce(add, [count(tapped, b, final, merged.origin) for b in shards(slice(400))])
    rules = build_rules("centroid", tapped.seen, SETTINGS.n_clusters)
    cascade = collected(final, statistics, merged).fit(tapped, rules, AcrossExits(), 0)
    e = len(rules)
    cascade = cascade.timed(StageTimes(np.array([1]), np.ones((1, e + 1)), np.ones((1, e + 1)), np.ones((1, e))))
    logits = reduce(add, [record_logits(cascade, b)[0] for b in shards(slice(400, 600))])
    path = shape_path(cascade, logits, SETTINGS)
    proofs = [record(path.cascade, b)[0] for b in shards(slice(600, 900))]
    counts = reduce(add, [SettingCounts.count(path.settings, proof) for proof in proofs])
    cascade, certificate = certify_path(path, counts, SETTINGS)
    result = run(Plan(cascade), batches_of(images[900:], 50), 100, 50)
    return merged, statistics, path, counts, cascade, certificate, result


@pytest.fixture(scope="module")
def whole(tapped, rgb_digits):
    return fit(tapped, rgb_digits, 1, seed=0)


@pytest.mark.parametrize(("n_shards", "seed"), [(2, 1), (2, 2), (7, 3)])
def test_shards_in_any_order_come_to_what_one_process_does(tapped, rgb_digits, whole, n_shards, seed):
    merged, statistics, path, counts, cascade, certificate, result = fit(tapped, rgb_digits, n_shards, seed)
    np.testing.assert_array_equal(merged.keys, whole[0].keys)
    torch.testing.assert_close(merged.features, whole[0].features)
    for one, other in zip(statistics.exits, whole[1].exits, strict=True):
        assert torch.equal(one.counts, other.counts)
        for name in ("sums", "scatter", "mean"):
            torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=1e-4, atol=1e-3)
    np.testing.assert_array_equal(statistics.images, whole[1].images)
    np.testing.assert_allclose(path.settings, whole[2].settings, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(cascade.thresholds, whole[4].thresholds, rtol=1e-3, atol=1e-4)
    assert counts.n == whole[3].n == 300
    assert certificate == whole[5]
    assert certificate.early > 0.2
    np.testing.assert_array_equal(result.labels, whole[6].labels)
    np.testing.assert_array_equal(result.exits, whole[6].exits)


def test_skipped_images_and_hashes_merge(tapped, rgb_digits):
    images = rgb_digits[:120].clone()
    images[7] = torch.nan
    merged = sample(tapped, batches_of(images, 50), 100)
    final = final_clusters(merged, 3, SETTINGS.clusters, seed=0)
    first = count(tapped, batches_of(images[:60], 25), final, merged.origin)
    second = count(tapped, batches_of(images[60:], 25), final, merged.origin)
    total = first + second
    assert list(total.skipped) == [7]
    assert int(total.exits[0].counts.sum()) == 119
    assert len(total.images) == 120
