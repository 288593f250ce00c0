"""The last step of a scikit-learn pipeline, on rows of flattened pixels, judged by scikit-learn's metrics.

uv run python examples/06_scikit_learn.py
"""

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.metrics import adjusted_rand_score, silhouette_score
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, MinMaxScaler

from ssl_exit import ExitClusterer
from ssl_exit.encoders.small import digits_encoder


def as_images(rows: np.ndarray) -> np.ndarray:
    """(N, 64) -> (N, 1, 8, 8)."""
    return rows.reshape(-1, 1, 8, 8).astype(np.float32)


x, y = load_digits(return_X_y=True)
x_train, x_test, _, y_test = train_test_split(x, y, random_state=0)

torch.manual_seed(0)
pipeline = make_pipeline(MinMaxScaler(), FunctionTransformer(as_images), ExitClusterer(digits_encoder(), n_clusters=10))
pipeline.set_params(exitclusterer__max_disagreement=0.05, exitclusterer__rule__name="centroid")
labels = pipeline.fit(x_train).predict(x_test)
print(f"adjusted Rand index {adjusted_rand_score(y_test, labels):.3f}, of {len(set(labels))} clusters")

clusterer = pipeline[-1]
images = pipeline[:-1].transform(x_test)
print(f"silhouette of the final features {silhouette_score(clusterer.embed(images), labels, metric='cosine'):.3f}")
print(f"mean cost {clusterer.run(images).cost.mean():.3f}; distances to centroids {clusterer.transform(images).shape}")
