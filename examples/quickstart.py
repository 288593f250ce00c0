"""Centroid exits for an encoder you already have: list exit points, fit, predict, evaluate, save.

    uv run python examples/quickstart.py

Uses scikit-learn's digits and an encoder trained here for a few seconds; put your own module and images in
their place.
"""

import tempfile

import torch
from sklearn.datasets import load_digits

from ssl_exit import ExitClusterer, Preprocessing, list_exits, load
from ssl_exit.encoders.small import digits_encoder
from ssl_exit.encoders.tapped import TappedEncoder
from ssl_exit.report.tables import exit_points_table, exit_table, summary
from ssl_exit.training import Optimization, build_training
from ssl_exit.training import train as train_encoder

# Images: an (N, C, H, W) float tensor, a Dataset, a DataLoader, or a folder (with preprocessing=...).
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
train, test = images[:1300], images[1300:]

# An encoder: any module from images to features. It is copied, never changed.
encoder = digits_encoder()
tapped = TappedEncoder.build(encoder, "auto", train)
as_they_are = Preprocessing(size=8, mean=(0.0,), std=(1.0,))
how = Optimization("adamw", learning_rate=2e-3, schedule="one_cycle")
train_encoder(build_training("simclr", tapped, as_they_are, views="drawing", optimization=how), train, epochs=15)

print(exit_points_table(list_exits(encoder, test[:1])), "\n")

# Fit: one pass, no labels. A fifth of the images is held out for thresholds and certificate.
clusterer = ExitClusterer(encoder, n_clusters=10, max_disagreement=0.05)
clusterer.fit(train)
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
    again = load(f"{folder}/model", encoder=digits_encoder())
    assert (again.predict(test) == labels).all()
