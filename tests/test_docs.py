"""The code on every page runs as written, and links lead somewhere."""

import re
import runpy
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader

from ssl_exit import EncoderSpec, ExitClusterer, Front
from ssl_exit.exits.rules import RULES
from ssl_exit.training.run import seeded

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
BLOCK = re.compile(r"(<!-- not run: [^\n]*-->\n)?```python\n(.*?)```", flags=re.DOTALL)
SHORTER = {  # what only takes longer
    "docs/training.md": {"epochs=200": "epochs=1"},
    "docs/front.md": {
        'front="auto"': 'front=Front("auto", epochs=2)',
        "front=my_network": 'front=Front("module", network=my_network, epochs=2)',
        "epochs=60": "epochs=2",
        "match=True": "match=True, epochs=2",
    },
    "README.md": {'front="auto"': 'front=Front("auto", epochs=2)'},
}


def code_of(page: str) -> str:
    code = "\n".join(block for skipped, block in BLOCK.findall((ROOT / page).read_text()) if not skipped)
    for long, short in SHORTER.get(page, {}).items():
        assert long in code
        code = code.replace(long, short)
    return code


PAGES = [str(page.relative_to(ROOT)) for page in [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]]


def layers(channels: int) -> nn.Module:
    """Four convolutions and an average: (N, channels, H, W) -> (N, 24)."""
    network = nn.Sequential()
    for i, (inputs, outputs) in enumerate([(channels, 16), (16, 16), (16, 24), (24, 24)], start=1):
        block = nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride=1 + (i == 3), padding=1), nn.ReLU())
        network.add_module(f"layer{i}", block)
    return network.append(nn.AdaptiveAvgPool2d(2)).append(nn.Flatten())


class Contrasting(pl.LightningModule):
    """As short as a training can be: views of one image are alike."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def training_step(self, batch, batch_idx):
        one, other = self.backbone(batch), self.backbone(batch.flip(3))
        return -nn.functional.cosine_similarity(one - one.mean(0), other - other.mean(0)).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


@pytest.fixture
def given(digits, tmp_path, monkeypatch) -> dict:
    """What pages take for granted: an encoder, images, a folder of photographs, a model that was saved."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "mine.py").write_text(
        "from tests.test_docs import layers\n\ndef build():\n    return layers(3).eval()\n"
    )
    large = nn.functional.interpolate(digits, size=16, mode="bilinear")
    large = torch.cat([large, large.flip(3)]).expand(-1, 3, -1, -1).contiguous()
    images, more, new = large.split([1700, 400, len(large) - 2100])
    (tmp_path / "photos").mkdir()
    for i, image in enumerate(images[:200]):
        Image.fromarray((image.permute(1, 2, 0).numpy() * 255).astype("uint8")).save(tmp_path / "photos" / f"{i}.png")
    with seeded(0):
        encoder, network = layers(3).eval(), layers(3).eval()
        classifier = nn.Sequential(layers(3), nn.Linear(96, 10)).eval()
    return {
        "encoder": encoder, "my_network": network, "classifier": classifier, "build": lambda: layers(3).eval(),
        "images": images, "more_images": more, "new_images": new,
        "targets": torch.tensor(load_digits().target).repeat(2)[1700:2100].numpy(),
        "module": Contrasting(layers(3)), "loader": DataLoader(images[:128], batch_size=64),
        "Front": Front, "torch": torch, "__name__": "page",
    }  # fmt: skip


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("page", [page for page in PAGES if code_of(page)])
def test_the_code_of_a_page_runs(page, given):
    if page == "docs/trust.md":
        spec = EncoderSpec("mine:build")
        ExitClusterer(spec, n_clusters=3, exits=["layer2"]).fit(given["images"][:200]).save("model")
    known = dict(RULES)  # a page may add one
    try:
        exec(compile(code_of(page), page, "exec"), given)
    finally:
        RULES.clear()
        RULES.update(known)
    assert CHECKS.get(page, lambda names: True)(given)


def changed(encoder: nn.Module) -> bool:
    """Whether its weights are other than those that pages are given."""
    with seeded(0):
        return not torch.equal(encoder.layer1[0].weight, layers(3).layer1[0].weight)


CHECKS = {  # what a page must have come to, where its code does not say so itself
    "docs/extend.md": lambda names: names["c"].evaluate(names["images"][1200:]).agreement > 0.7,
    "docs/scale.md": lambda names: "disagreement <= 20.00% with confidence 50%" in str(names["certificate"]),
    "docs/training.md": lambda names: changed(names["encoder"]),
    "docs/howto/encoder.md": lambda names: names["c"].exit_names_ == ["layer1.1", "layer2.1", "end"],
    "docs/howto/watch.md": lambda names: [row["epoch"] for row in names["exits"].history] == [1, 2],
    "docs/howto/clusters.md": lambda names: names["c"].n_clusters == 10,
}


def test_the_page_of_parameters_is_that_of_the_settings():
    page = runpy.run_path(str(DOCS / "make_parameters.py"))["page"]()
    assert (DOCS / "parameters.md").read_text() == page, "run docs/make_parameters.py"


def test_links_lead_somewhere():
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS.rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
            assert "://" in target or (page.parent / target).exists(), (page.name, target)
