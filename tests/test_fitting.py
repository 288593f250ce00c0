"""One pass: what is kept, and what is refused."""

import numpy as np
import pytest
import torch

from ssl_exit.data.images import Batch, open_images
from ssl_exit.encoders.tapped import TappedEncoder
from ssl_exit.errors import InputError
from ssl_exit.exits.centroid import CentroidRule
from ssl_exit.exits.kmeans import FinalClusters
from ssl_exit.fitting import first_images, fit_cascade
from tests.conftest import untrained


def test_statistics_are_those_of_all_descriptors_at_once(rgb_digits, monkeypatch):
    monkeypatch.setattr("ssl_exit.fitting.SAMPLE", 50)
    encoder = untrained("resnet20", rgb_digits)
    tapped = TappedEncoder.build(encoder, ["layer1", "layer2"], rgb_digits[:1], descriptor="average").eval()
    batches = open_images(rgb_digits[:400]).batches(np.arange(400), 64)
    fitted = fit_cascade(tapped, batches, 400, rule=CentroidRule, n_clusters=3, spherical=True, seed=0)
    assert fitted.n_fit == 400
    assert fitted.n_sample == 400  # 256 a cluster and more
    with torch.no_grad():
        described, features = tapped(rgb_digits[:400])
    final = FinalClusters.fit(features, 3, spherical=True, seed=0)
    torch.testing.assert_close(fitted.cascade.final.centroids, final.centroids, atol=1e-4, rtol=1e-4)
    labels = final(features)
    for rule, seen in zip(fitted.cascade.exit_rules, (16, 48), strict=True):
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

    assert first_images(Source(), np.arange(4), 2).shape == (2, 1, 4, 4)
    with pytest.raises(InputError, match="none of the 4 images to fit on can be read; for example: not an image"):
        first_images(Broken(), np.arange(4), 2)
