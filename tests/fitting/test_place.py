"""Which exits are left out, on scores made so that the answer is known."""

import numpy as np
import pytest

from ssl_exit.exits.thresholds import Recorded
from ssl_exit.fitting.place import chosen


def made(quality, n=4000, k=4, seed=0):
    """Exits that are right with probability score ** (1 / quality); quality 0 guesses."""
    rng = np.random.default_rng(seed)
    final = rng.integers(0, k, n)
    scores = rng.uniform(0.5, 1, (n, len(quality))).astype(np.float32)
    p = np.column_stack([scores[:, i] ** (1 / q) if q else np.full(n, 1 / k) for i, q in enumerate(quality)])
    right = rng.uniform(size=p.shape) < p
    labels = np.where(right, final[:, None], (final[:, None] + rng.integers(1, k, p.shape)) % k)
    return Recorded(labels, scores, final)


def test_an_exit_that_guesses_is_left_out_and_one_that_knows_stays():
    stage, own = np.array([0.3, 0.3, 0.4]), np.array([0.01, 0.01, 0.0])
    first, second = chosen(["a", "b"], made([0, 20]), stage, own, 4, 0.05)
    assert (first.kept, second.kept) == (False, True)
    assert first.saving < 0.001 < 0.1 < second.saving
    assert first.agreement == pytest.approx(0.25, abs=0.03)
    assert first.cost == pytest.approx(0.31)
    assert second.cost == pytest.approx(0.62)
    assert "left out, would save" in str(first)
    assert "kept, saves" in str(second)


def test_an_exit_whose_work_is_more_than_it_saves_is_left_out():
    stage = np.array([0.1, 0.5, 0.4])
    cheap = chosen(["a", "b"], made([10, 20]), stage, np.array([0.01, 0.01, 0.0]), 4, 0.05)
    dear = chosen(["a", "b"], made([10, 20]), stage, np.array([0.9, 0.01, 0.0]), 4, 0.05)
    assert cheap[0].kept
    assert not dear[0].kept
    assert dear[1].kept
    assert dear[0].saving < 0


def test_at_least_one_exit_stays():
    choices = chosen(["a", "b", "c"], made([0, 0, 0]), np.full(4, 0.25), np.full(4, 0.01), 4, 0.01)
    assert sum(choice.kept for choice in choices) == 1
