"""The examples run as they stand."""

import runpy
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).resolve().parents[1] / "examples").glob("*.py"))
NEEDS = {"04_timm": "timm", "05_transformers": "transformers"}  # what ssl_exit itself does not install


SLOW = ("02_lightly", "04_timm", "09_compare_rules")
MARKED = [pytest.param(file, marks=[pytest.mark.slow] * (file.stem in SLOW)) for file in EXAMPLES]


@pytest.mark.parametrize("example", MARKED, ids=[file.stem for file in EXAMPLES])
def test_example_runs(example, capsys):
    if example.stem in NEEDS:
        pytest.importorskip(NEEDS[example.stem])
    runpy.run_path(str(example), run_name="__main__")
    assert capsys.readouterr().out
