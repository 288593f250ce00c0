"""Every reason for which nothing exits, and what less agreement would release."""

import numpy as np
import pytest

from ssl_exit.exits.certificate import Certificate
from ssl_exit.exits.thresholds import NEVER, Recorded
from ssl_exit.measure.explanation import explain
from ssl_exit.report.tables import explanation_table

K = 2
NOTHING = np.full((2, K), NEVER)
PATH = np.stack([NOTHING, np.full((2, K), 0.9), np.full((2, K), 0.5), np.zeros((2, K))])
DISAGREEMENT = np.array([0.0, 0.004, 0.038, 0.3])  # of 1,000, 4 certify 1 % and 38 certify 5 %


def certificate(n=1000, settings=0):
    return Certificate(0.001, 0.95, "overall", n, 0, 0.01, 0.0, settings, 1.0, 1.0)


def recorded(right=1.0, n=400):
    rng = np.random.default_rng(0)
    final = rng.integers(0, K, n)
    labels = np.where(rng.uniform(size=(n, 2)) < right, final[:, None], 1 - final[:, None])
    return Recorded(labels, np.linspace(0.4, 0.95, 2 * n).reshape(n, 2).astype(np.float32), final)


def why(data, thresholds, certified, path=PATH):
    return explain(["a", "b"], data, thresholds, path, DISAGREEMENT, certified)


def test_who_comes_who_leaves_and_who_would():
    data = recorded()
    thresholds = np.array([[0.9, NEVER], [0.6, 0.7]])
    found = why(data, thresholds, certificate(settings=3))
    leaves_first = (data.scores[:, 0] >= 0.9) & (data.labels[:, 0] == 0)
    first, second = found.exits
    assert (first.reached, first.left) == (400, leaves_first.sum())
    assert second.reached == 400 - leaves_first.sum()
    assert first.threshold == (pytest.approx(0.9), None, None)
    assert second.threshold == (pytest.approx(0.6), pytest.approx(0.7), pytest.approx(0.7))
    assert sum(first.histogram) == 400
    assert first.histogram[:4] == [0, 0, 0, 0]
    assert first.released[0.99] == (data.scores[:, 0] >= 0.9).sum()  # 4 of 1,000 certify 1 %
    assert first.released[0.95] == (data.scores[:, 0] >= 0.5).sum()
    assert found.released[0.9] == found.released[0.95]
    assert found.reason is None
    table = explanation_table(found)
    assert "never" in table
    assert "images exit early" in table


@pytest.mark.parametrize(
    ("data", "thresholds", "certified", "message"),
    [
        (recorded(), NOTHING, certificate(n=0), r"nothing was held out \(holdout=0\)"),
        (recorded(), NOTHING, certificate(n=100), "100 images certify nothing.*needs at least 2995"),
        (recorded(right=0.5), NOTHING, certificate(n=9000), "surest 1% at . agree with the full encoder on only"),
        (
            recorded(),
            np.full((2, K), 0.99),
            certificate(9000, 5),
            "largest score is 0.950 and the lowest threshold 0.990",
        ),
        (recorded(), NOTHING, certificate(n=9000), "max_disagreement=0.01 would release"),
        (recorded(), NOTHING, certificate(9000, 5), "certified, but every"),
    ],
)
def test_every_reason_is_told(data, thresholds, certified, message):
    found = why(data, thresholds, certified)
    assert found.leaving == 0
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(found.reason)
    assert found.reason in explanation_table(found)


def test_where_no_agreement_releases_anything():
    found = why(recorded(), NOTHING, certificate(n=9000), path=np.stack([NOTHING] * 4))
    assert "no agreement that was tried would release any" in found.reason
