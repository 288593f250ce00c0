"""A front before an encoder that cannot be cut: here a function on NumPy arrays, as an ONNX session or a service is.

uv run python examples/07_front.py
"""

import numpy as np
from sklearn.datasets import load_digits
from torch import Tensor, tensor

from ssl_exit import ExitClusterer, Front, Runtime

digits = tensor(load_digits().images, dtype=Tensor().dtype)[:, None] / 16
rng = np.random.default_rng(0)
first, second = (rng.standard_normal(shape).astype(np.float32) for shape in ((64, 4096), (4096, 1024)))
asked = 0


def encoder(images: Tensor) -> np.ndarray:
    """(N, 1, 8, 8) -> (N, 1024)."""
    global asked
    asked += len(images)
    return np.maximum(images.numpy().reshape(len(images), -1) @ first, 0) @ second


front = Front("auto", width=16, epochs=15, mirror=False)  # digits must not be mirrored
c = ExitClusterer(encoder, n_clusters=10, front=front, max_disagreement=0.04, runtime=Runtime(progress=False))
c.fit(digits[:1400])
print(c.certificate_)
asked = 0
result = c.run(digits[1400:])
print(f"the encoder saw {asked} of {len(result.labels)} images; labels {np.bincount(result.labels)}")
