"""The examples in docs/ run as written."""

import re
import runpy
from pathlib import Path

import pytest
import torch

from ssl_exit.exits.rules import RULES
from ssl_exit.training.run import seeded
from tests.conftest import untrained

DOCS = Path(__file__).resolve().parent.parent / "docs"


def code_of(page: str) -> str:
    return "\n".join(re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), flags=re.DOTALL))


def test_the_lines_on_training_run(rgb_digits):
    with seeded(0):
        encoder = torch.nn.Sequential(*(torch.nn.Conv2d(3, 3, 3, stride=2) for _ in range(4)))
    before = encoder[0].weight.clone()
    code = code_of("training.md").replace("epochs=200", "epochs=1")
    exec(compile(code, "training.md", "exec"), {"encoder": encoder, "images": rgb_digits[:200].clamp(0, 1)})
    assert not torch.equal(encoder[0].weight, before)


def test_the_fit_in_pieces_runs(rgb_digits, capsys):
    code = code_of("scale.md")
    images = torch.cat([rgb_digits, rgb_digits.flip(3)])
    exec(compile(code, "scale.md", "exec"), {"encoder": untrained("resnet20", rgb_digits), "images": images})
    assert "disagreement <= 20.00% with confidence 50%" in capsys.readouterr().out


@pytest.mark.parametrize("page", ["extend.md"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_examples_of_a_page_run(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    known = dict(RULES)
    code = code_of(page)
    try:
        exec(compile(code, str(DOCS / page), "exec"), {"__name__": "example"})
    finally:
        RULES.clear()
        RULES.update(known)
    assert float(capsys.readouterr().out) > 0.7


def test_the_page_of_parameters_is_that_of_the_settings():
    page = runpy.run_path(str(DOCS / "make_parameters.py"))["page"]()
    assert (DOCS / "parameters.md").read_text() == page, "run docs/make_parameters.py"


def test_links_lead_somewhere():
    for page in [DOCS.parent / "README.md", DOCS.parent / "CONTRIBUTING.md", *DOCS.glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
            assert "://" in target or (page.parent / target).exists(), (page.name, target)
