"""One pass: what is kept, and what is refused."""

import numpy as np
import pytest
import torch

from ssl_exit.data.images import Batch, open_images
from ssl_exit.data.reading import first_images
from ssl_exit.encoders.tapped import TappedEncoder
from ssl_exit.errors import InputError
from ssl_exit.exits.across import AcrossExits
from ssl_exit.exits.final import FinalClusters
from ssl_exit.exits.registry import build_rules
from ssl_exit.fitting.count import collect
from ssl_exit.fitting.sample import Clustering
from tests.conftest import untrained


def test_statistics_are_those_of_all_descriptors_at_once(rgb_digits, monkeypatch):
    monkeypatch.setattr("ssl_exit.fitting.sample.SAMPLE", 50)
    encoder = untrained("resnet20", rgb_digits)
    tapped = TappedEncoder.build(encoder, ["layer1", "layer2"], rgb_digits[:1], descriptor="average").eval()
    batches = open_images(rgb_digits[:400]).batches(np.arange(400), 64)
    rules = build_rules("centroid", tapped.seen, 3)
    collected = collect(tapped, [batches], 400, rules, Clustering(3))
    assert collected.n_fit == 400
    assert collected.n_clustered == 400  # 256 a cluster and more
    with torch.no_grad():
        described, features = tapped(rgb_digits[:400])
    final = FinalClusters.fit(features, 3, spherical=True, seed=0)
    torch.testing.assert_close(collected.final.centroids, final.centroids, atol=1e-4, rtol=1e-4)
    labels = final(features)
    cascade = collected.fit(tapped, rules, AcrossExits(), 0)
    for rule, seen in zip(cascade.rules, (16, 48), strict=True):
        x = described[:, :seen].double()
        means = torch.stack([x[labels == k].mean(0) for k in range(3)])
        nearest = rule.logits(means.float()).argmax(1)
        assert nearest.tolist() == [0, 1, 2]


def test_the_first_usable_batch():
    class Source:
        paths = None

        def __len__(self):
            return 4

        def batches(self, order, batch_size):
            yield Batch(torch.empty(0, dtype=torch.int64), torch.empty(0), {0: "broken", 1: "broken"})
            yield Batch(torch.tensor([2, 3]), torch.ones(2, 1, 4, 4))

    class Broken(Source):
        def batches(self, order, batch_size):
            yield Batch(torch.empty(0, dtype=torch.int64), torch.empty(0), {0: "not an image"})

    assert first_images(Source(), np.arange(4), 2).images.shape == (2, 1, 4, 4)
    with pytest.raises(InputError, match="none of the 4 images can be read; for example: not an image"):
        first_images(Broken(), np.arange(4), 2)


def test_leaving_exits_out_equals_collecting_without_them(rgb_digits):
    encoder = untrained("resnet20", rgb_digits)
    for accumulate in (True, False):

        def tapped(exits, accumulate=accumulate):
            built = TappedEncoder.build(encoder, exits, rgb_digits[:1], descriptor="average", accumulate=accumulate)
            return built.eval()

        def collected(exits, tapped=tapped):
            batches = open_images(rgb_digits[:300]).batches(np.arange(300), 64)
            rules = build_rules("centroid", tapped(exits).seen, 3)
            return collect(tapped(exits), [batches], 300, rules, Clustering(3))

        three = tapped(["layer1", "layer2.0", "layer2"])
        kept = collected(["layer1", "layer2.0", "layer2"]).at(three, [0, 2])
        fresh = collected(["layer1", "layer2"])
        torch.testing.assert_close(kept.descriptors, fresh.descriptors)
        assert len(kept.statistics.exits) == len(fresh.statistics.exits) == (1 if accumulate else 2)
        for one, other in zip(kept.statistics.exits, fresh.statistics.exits, strict=True):
            torch.testing.assert_close(one.sums, other.sums)
            torch.testing.assert_close(one.scatter, other.scatter)
