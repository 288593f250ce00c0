"""An encoder in plain PyTorch: list its exit points, fit, predict, evaluate, save.

    uv run python examples/01_quickstart.py

The encoder has random weights and the images are scikit-learn's digits, so that this runs anywhere in seconds; put
your own module and images in their place.
"""

import tempfile

import torch
from sklearn.datasets import load_digits
from torch import nn

from ssl_exit import ExitClusterer, list_exits, load
from ssl_exit.report.tables import exit_points_table, exit_table, summary

# Images: an (N, C, H, W) float tensor; a Dataset, a DataLoader or a folder (with preprocessing=...) does as well.
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
train, test = images[:1300], images[1300:]


def encoder() -> nn.Module:
    """Any module from images to features: (N, 1, 8, 8) -> (N, 64)."""
    layers = [
        layer
        for inputs, outputs in [(1, 16), (16, 32), (32, 32), (32, 64), (64, 64)]
        for layer in (nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU())
    ]
    return nn.Sequential(*layers, nn.AvgPool2d(2), nn.Flatten(), nn.Linear(1024, 64))


torch.manual_seed(0)
network = encoder()
print(exit_points_table(list_exits(network, test[:1])), "\n")

# Fit: one pass, no labels; the encoder is copied, never changed. A fifth of the images is held out for thresholds and
# the certificate.
clusterer = ExitClusterer(network, n_clusters=10, max_disagreement=0.05).fit(train)
print(clusterer.certificate_, "\n")

# Predict: labels in input order; run() also tells where each image left and what it cost.
labels = clusterer.predict(test)
result = clusterer.run(test)
assert (labels == result.labels).all()

# Evaluate: early exit beside the full encoder. Ground truth is for reports only.
evaluation = clusterer.evaluate(test, digits.target[1300:])
print(exit_table(evaluation), "\n")
print(summary(evaluation))

# Save and load: safetensors and JSON, no pickle.
with tempfile.TemporaryDirectory() as folder:
    clusterer.save(f"{folder}/model")
    again = load(f"{folder}/model", encoder())
    assert (again.predict(test) == labels).all()
