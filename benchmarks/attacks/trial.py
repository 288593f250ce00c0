"""What the attacks share."""

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import clusterer
from sklearn.datasets import load_digits
from torch import Tensor

from ssl_exit import EncoderSpec, ExitClusterer, Preprocessing

Attack = Callable[[np.random.Generator, Path], tuple[str, str]]
PREPROCESSING = Preprocessing(8, (0.0,), (1.0,))
MARKER = Path("/tmp") / f"ssl_exit-campaign-{os.getpid()}-code-ran"
PLANTED = f"import pathlib\npathlib.Path({str(MARKER)!r}).touch()\nfrom ssl_exit.encoders.small import digits_encoder\n"


def digits() -> Tensor:
    """(1797, 1, 8, 8) in [0, 1]."""
    return torch.tensor(load_digits().images, dtype=torch.float32)[:, None] / 16


def must(true: bool, promise: str) -> None:
    if not true:
        raise AssertionError(promise)


def no_code_ran() -> None:
    if MARKER.exists():
        MARKER.unlink()
        raise AssertionError("code in the data ran")


def fitted(images: Tensor, **flat: Any) -> ExitClusterer:
    torch.manual_seed(0)
    how = {"device": "cpu", "max_disagreement": 0.1, "confidence": 0.5, "n_clusters": 5} | flat
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return clusterer(EncoderSpec("digits_cnn"), PREPROCESSING, **how).fit(images)
