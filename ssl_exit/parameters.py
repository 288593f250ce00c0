"""Checks of what users pass to ExitClusterer, before anything is computed."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ssl_exit.data.preprocessing import Preprocessing
from ssl_exit.encoders.inference import PRECISIONS
from ssl_exit.errors import InputError
from ssl_exit.exits.across import AcrossExits
from ssl_exit.exits.certificate import GUARANTEES
from ssl_exit.exits.registry import check_rule

CHOICES = {
    "thresholds": ("search", "exit", "cbt"),
    "guarantee": GUARANTEES,
    "cost": ("macs", "time"),
    "precision": tuple(PRECISIONS),
}
FIXED = (  # by fit(): the cascade is made of them
    "n_clusters", "rule", "rule_options", "patience", "ensemble", "supervised", "precision", "normalize", "spherical"
)  # fmt: skip
LEAST = {"n_clusters": 1, "batch_size": 1, "random_state": 0, "num_workers": 0}
SHARES = {"max_disagreement": False, "confidence": False, "holdout": True, "false_alarm": False}  # is 0 allowed?


def check_parameters(given: Mapping[str, Any]) -> None:
    """Raise InputError for the first parameter, by name, that cannot be used."""
    if not isinstance(given["rule_options"], (Mapping, type(None))):
        raise InputError(f"rule_options must map names to values, like {{'hidden': 64}}; got {given['rule_options']!r}")
    if not isinstance(given["preprocessing"], (Preprocessing, type(None))):
        raise InputError(
            f"preprocessing must be an ssl_exit.Preprocessing or None; got {type(given['preprocessing']).__name__}: "
            "apply any other transform in your Dataset, and give none here"
        )
    check_rule(given["rule"], given["rule_options"])
    AcrossExits(given["patience"], given["ensemble"])
    for name, legal in CHOICES.items():
        if given[name] not in legal:
            raise InputError(f"{name} must be one of {legal}; got {given[name]!r}")
    usable_device(given["device"])
    for name, least in LEAST.items():
        if not isinstance(given[name], (int, np.integer)) or given[name] < least:
            raise InputError(f"{name} must be a whole number >= {least}; got {given[name]!r}")
    for name, zero in SHARES.items():
        value = given[name]
        if not isinstance(value, (int, float, np.number)) or not (0 < value < 1 or (zero and value == 0)):
            raise InputError(f"{name} must lie between 0 and 1; got {value!r}")
    if not isinstance(given["audit"], (int, float, np.number)) or not 0 <= given["audit"] <= 1:
        raise InputError(f"audit must lie between 0 and 1; got {given['audit']!r}")
    if given["audit"] and given["guarantee"] == "expectation":
        raise InputError(
            'guarantee "expectation" lets a single model disagree more than asked: an audit cannot tell; use "overall"'
        )


def checked_classes(y: np.ndarray, n: int, n_classes: int) -> np.ndarray:
    """Classes of n images, (n,) int64, from 0 to n_classes - 1; InputError if they are anything else."""
    classes = np.asarray(y)
    whole = classes.shape == (n,) and np.issubdtype(classes.dtype, np.integer)
    if not whole or classes.min() < 0 or classes.max() >= n_classes:
        raise InputError(
            f"y must hold one class from 0 to {n_classes - 1} for each of the {n} images; got shape {classes.shape} of "
            f"{classes.dtype}"
        )
    return classes.astype(np.int64)


def checked_targets(targets: np.ndarray | Sequence[int], n: int) -> np.ndarray:
    """Ground truth of n images, (n,); InputError if there is not one for each."""
    found = np.asarray(targets)
    if found.shape != (n,):
        raise InputError(f"targets must have shape ({n},), one for each image; got {found.shape}")
    return found


def usable_device(name: str) -> torch.device:
    """The device of that name; "auto" is CUDA where there is one.

    Raises:
        InputError: it does not exist or cannot be used.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from error
    return device
