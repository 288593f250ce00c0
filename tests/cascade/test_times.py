"""Measured times: what they say of compaction, of fewer exits, and that they are of what runs."""

import numpy as np
import pytest

from ssl_exit.cascade.times import StageTimes, stage_times
from ssl_exit.measure.seconds import segment_seconds

TIMES = StageTimes(
    sizes=np.array([1, 8, 64]),
    stages=np.array([[2.0, 2.0, 2.0], [2.0, 2.0, 2.0], [4.0, 16.0, 16.0]]),
    exits=np.array([[0.1, 0.1, 0.0]] * 3),
    moves=np.array([[0.5, 0.5], [0.5, 0.5], [2.0, 20.0]]),
)


@pytest.mark.parametrize(
    ("stages", "before", "after", "pays"),
    [
        (range(1, 2), 64, 8, True),  # 16 - 2 > 0.5
        (range(1, 2), 8, 1, False),  # a stage takes as long for 1 as for 8
        (range(1, 3), 64, 63, False),  # 2 stages x 0.25 < 1.97
        (range(1, 2), 128, 64, True),  # in proportion beyond the largest size: 32 - 16 > 2
        (range(2, 3), 64, 60, False),  # moving takes longer than the stage
    ],
)
def test_compaction_pays_where_the_stages_behind_take_longer_than_moving(stages, before, after, pays):
    assert TIMES.compacting_pays(stages, before, after) is pays


def test_without_an_exit_its_stages_are_one():
    kept = TIMES.without([1])
    np.testing.assert_array_equal(kept.stages, [[4.0, 2.0], [4.0, 2.0], [20.0, 16.0]])
    np.testing.assert_array_equal(kept.exits, [[0.1, 0.0]] * 3)
    np.testing.assert_array_equal(kept.moves, [[0.5], [0.5], [20.0]])
    np.testing.assert_array_equal(TIMES.stage_seconds, [1 / 16, 1 / 4, 1 / 4])


def test_times_of_a_cascade(fitted, rgb_digits):
    stops = len(fitted.exit_points_) + 1
    model, cascade = fitted.model_, fitted.model_.cascade
    times = stage_times(cascade.tapped, cascade.rules, cascade.final, rgb_digits[:32], repeats=2)
    assert times.sizes.tolist() == [1, 8, 32]
    assert times.stages.shape == times.exits.shape == (3, stops)
    assert times.moves.shape == (3, stops - 1)
    assert all((seconds > 0).all() for seconds in (times.stages, times.exits, times.moves))
    segments, whole = segment_seconds(model.plan, model.full_plan, rgb_digits[:32], 64, repeats=2)
    assert len(segments) == len(model.plan.segments)
    assert (segments > 0).all()
    assert whole > 0
