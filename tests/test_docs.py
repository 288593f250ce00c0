"""The examples in docs/ run as written."""

import re
from pathlib import Path

import pytest

from ssl_exit.exits.rules import RULES

DOCS = Path(__file__).resolve().parent.parent / "docs"


@pytest.mark.parametrize("page", ["extend.md"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_examples_of_a_page_run(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    known = dict(RULES)
    code = "\n".join(re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), flags=re.DOTALL))
    try:
        exec(compile(code, str(DOCS / page), "exec"), {"__name__": "example"})
    finally:
        RULES.clear()
        RULES.update(known)
    assert float(capsys.readouterr().out) > 0.7
