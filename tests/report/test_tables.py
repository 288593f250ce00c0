"""Tables say what the evaluation found."""

import numpy as np

from ssl_exit.report.tables import exit_points_table, exit_table, summary, text_table


def test_columns_line_up():
    table = text_table(("name", "n"), [("a", "1"), ("long name", "1000")])
    assert table.splitlines() == ["name          n", "---------  ----", "a             1", "long name  1000"]


def test_exit_table_and_summary(fitted, rgb_digits):
    evaluation = fitted.evaluate(rgb_digits[800:], np.arange(200) % 5)
    lines = exit_table(evaluation).splitlines()
    assert len(lines) == len(evaluation.exits) + 2
    for line, row in zip(lines[2:], evaluation.exits, strict=True):
        assert line.split()[:3] == [row.name, f"{row.cost:.3f}", f"{row.share:.1%}"]
    text = summary(evaluation)
    assert f"{evaluation.agreement:.4f}" in text
    assert f"{evaluation.cost_macs:.3f}" in text
    assert f"{evaluation.metrics['acc']:.4f} / {evaluation.metrics['acc_full']:.4f}" in text
    assert "ACC" not in summary(fitted.evaluate(rgb_digits[800:840]))


def test_exit_points_table(fitted):
    lines = exit_points_table(fitted.exit_points_).splitlines()
    first = fitted.exit_points_[0]
    assert lines[2].split() == [first.name, "x".join(map(str, first.shape)), f"{first.cost:.3f}"]
