"""The attacks of `campaign.py`: each prepares once, and returns what does one trial with a random generator.

A trial returns its kind and what came of it, or raises where a promise of docs/trust.md is broken.
"""

from collections.abc import Callable
from pathlib import Path

from attacks.answers import batchings, encoders
from attacks.folders import folders
from attacks.kills import drafts, kills
from attacks.models import models
from attacks.trial import Attack
from attacks.weights import weights

ATTACKS: dict[str, tuple[Callable[[Path], Attack], int]] = {
    "models": (models, 52_000),
    "weights": (weights, 950),
    "folders": (folders, 500),
    "kills": (kills, 710),
    "drafts": (drafts, 3_000),
    "batchings": (batchings, 4_000),
    "encoders": (encoders, 250),
}
