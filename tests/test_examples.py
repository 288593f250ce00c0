"""The examples run as they stand."""

import runpy
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).resolve().parents[1] / "examples").glob("*.py"))
NEEDS = {"04_timm": "timm", "05_transformers": "transformers"}  # what ssl_exit itself does not install


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda file: file.stem)
def test_example_runs(example, capsys):
    if example.stem in NEEDS:
        pytest.importorskip(NEEDS[example.stem])
    runpy.run_path(str(example), run_name="__main__")
    assert capsys.readouterr().out
