"""Evaluations add up, and time is measured where it is said to be."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from ssl_exit.errors import InputError


@pytest.fixture
def evaluation(fitted, rgb_digits):
    return fitted.evaluate(rgb_digits[800:], np.arange(200) % 5)


def test_rows_add_up(fitted, evaluation, rgb_digits):
    result = fitted.run(rgb_digits[800:])
    full = fitted.predict_full(rgb_digits[800:])
    np.testing.assert_array_equal(evaluation.result.labels, result.labels)
    np.testing.assert_array_equal(evaluation.full_labels, full)
    assert evaluation.agreement == (result.labels == full).mean()
    assert evaluation.cost_macs == pytest.approx(result.cost.mean())
    assert sum(row.share for row in evaluation.exits) == pytest.approx(1)
    assert sum(row.share * row.cost for row in evaluation.exits) == pytest.approx(evaluation.cost_macs)
    agreed = sum(row.share * row.agreement for row in evaluation.exits if row.share)
    assert agreed == pytest.approx(evaluation.agreement)
    assert evaluation.exits[-1].name == "end"
    assert evaluation.cost_time > 0
    assert set(evaluation.metrics) == {"acc", "nmi", "ari", "acc_full", "nmi_full", "ari_full"}


def test_it_is_ready_for_json(evaluation):
    read = json.loads(json.dumps(evaluation.to_dict(), allow_nan=False))
    assert {"agreement", "cost_macs", "cost_time", "acc", "acc_full", "nmi", "ari", "exits"} <= set(read)
    assert set(read["exits"][0]) == {"name", "cost", "share", "agreement"}


def test_without_targets_no_metrics(fitted, rgb_digits):
    evaluation = fitted.evaluate(rgb_digits[800:840])
    assert evaluation.metrics == {}


def test_nothing_usable_is_an_error(fitted, rgb_digits):
    with pytest.raises(InputError, match="none of the 5 images can be used"):
        fitted.evaluate(rgb_digits[:5] * torch.nan)


def test_stage_times_of_a_cascade_predict_and_the_verdict_says_why(evaluation):
    assert 0 < evaluation.time_of_exits < evaluation.cost_time_predicted
    slow = replace(evaluation, cost_time=1.2, cost_time_predicted=1.1, time_of_exits=0.3)
    assert slow.verdict.startswith("exits do not pay here: images that leave early save 20.0% of the full")
    assert "exits' own work takes 30.0%, queues and moving 10.0%" in slow.verdict
    assert replace(slow, cost_time=0.7).verdict.startswith("exits pay: ")
