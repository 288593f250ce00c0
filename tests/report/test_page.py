"""The page to look at: what it says is what was measured, and it needs nothing but itself."""

import base64
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from ssl_exit import Preprocessing
from ssl_exit.data.image_files import FolderImages
from ssl_exit.encoders.small import digits_encoder
from ssl_exit.report import page
from ssl_exit.report.page import write_report
from ssl_exit.training.run import seeded
from tests.conftest import clusterer

GREY = Preprocessing(8, (0.0,), (1.0,))
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


class Parts(HTMLParser):
    """Tags with attributes, and all text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += f" {data.strip()}"


@pytest.fixture(scope="module")
def fitted(digits):
    with seeded(0):
        encoder = digits_encoder()
    return clusterer(encoder, GREY, n_clusters=4, max_disagreement=0.3, confidence=0.5).fit(digits[:900])


@pytest.fixture
def folder(image_folder):
    """Sub-folders, one of them with a name that is code, and a broken image."""
    (image_folder / "3").rename(image_folder / "<script>alert(1)<")
    (image_folder / "0" / "broken.png").write_text("<b>no image</b>")
    return image_folder


def written(c, folder, file, **changes) -> tuple[Parts, str]:
    images = FolderImages(folder, GREY)
    evaluation = replace(c.evaluate(images, images.targets), **changes)
    write_report(file, c.model_, images, evaluation)
    text = file.read_text()
    return Parts(text), text


@pytest.mark.filterwarnings("ignore:.*could not be used")
def test_it_says_what_was_measured_and_holds_everything(fitted, folder, tmp_path):
    changes = {"agreement": 0.9631, "cost_macs": 0.4321, "cost_time": 0.5678, "teaching_seconds": 50.0}
    parts, text = written(fitted, folder, tmp_path / "report.html", **changes)
    for figure in ("96.3 %", "0.43", "0.57", "60 images in 4 clusters", "1 more could not be used"):
        assert figure in parts.text
    assert str(fitted.certificate_) in parts.text
    assert "<script" not in text
    assert "<b>" not in text
    assert "<script>alert(1)<" in parts.text  # as text
    assert "0/broken.png" in parts.text
    for tag, attributes in parts.tags:
        assert tag not in ("script", "link", "iframe", "object")
        for name in ("src", "href", "xlink:href"):
            assert attributes.get(name, "#").startswith(("data:image/jpeg;base64,", "#"))
    pictures = [attributes for tag, attributes in parts.tags if tag == "img"]
    assert all(picture["alt"] for picture in pictures)
    (tmp_path / "one.jpg").write_bytes(base64.b64decode(pictures[0]["src"].partition(",")[2]))
    assert max(Image.open(tmp_path / "one.jpg").size) <= 64
    assert "url(" not in re.sub(r"url\(#\w+\)", "", text)


@pytest.mark.filterwarnings("ignore:.*could not be used")
def test_the_table_of_clusters_and_classes_counts_every_image(fitted, folder, tmp_path):
    images = FolderImages(folder, GREY)
    evaluation = fitted.evaluate(images, images.targets)
    table = page._confusion(images, evaluation, 4)
    labels = evaluation.result.labels
    for cluster, cells in table.rows:
        for name, (n, _) in zip(table.classes, cells, strict=True):
            assert n == ((labels == cluster) & (images.targets == images.classes.index(name))).sum()
    assert sum(n for _, cells in table.rows for n, _ in cells) == 60


def test_without_classes_there_is_no_table_and_a_supervised_encoder_has_no_centroids(image_folder, digits, tmp_path):
    flat = tmp_path / "flat"
    flat.mkdir()
    for file in image_folder.rglob("*.png"):
        shutil.copy(file, flat / file.name)
    with seeded(0):
        encoder = digits_encoder()
    c = clusterer(encoder, GREY, n_clusters=128, supervised=True, max_disagreement=0.3, confidence=0.5).fit(
        digits[:700]
    )
    parts, _ = written(c, flat, tmp_path / "report.html")
    assert "Clusters and classes" not in parts.text
    assert "128 classes of the encoder" in parts.text
    assert "Galleries of the 60 largest of 128 clusters" in parts.text


def test_a_hundred_thousand_images_and_a_hundred_clusters_stay_small(
    fitted, image_folder, digits, tmp_path, monkeypatch
):
    with seeded(0):
        encoder = digits_encoder()
    c = clusterer(encoder, GREY, n_clusters=100, max_disagreement=0.3, confidence=0.5).fit(digits[:900])
    images = FolderImages(image_folder, GREY)
    images.paths = images.paths * 30  # 1,800 files
    evaluation = c.evaluate(images)
    labels = np.arange(100_000) % 100
    write_report(tmp_path / "report.html", c.model_, images, evaluation, labels)
    assert (tmp_path / "report.html").stat().st_size < 5_000_000
    text = (tmp_path / "report.html").read_text()
    assert "100,000 images in 100 clusters" in text
    assert text.count("<img") <= page.PICTURES


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian's package chromium)")
@pytest.mark.filterwarnings("ignore:.*could not be used")
@pytest.mark.parametrize("width", [1280, 390])
def test_in_a_browser_nothing_fails_and_nothing_is_wider_than_the_window(width, fitted, folder, tmp_path):
    written(fitted, folder, tmp_path / "report.html")
    frame = (
        f"<iframe id=f width={width} height=900 src=report.html></iframe><pre id=o></pre><script>f.onload=()=>{{"
        "let d=f.contentDocument,e=d.documentElement;"
        "o.textContent=[e.scrollWidth,e.clientWidth,d.images.length,"
        "[...d.images].filter(i=>{i.loading='eager';return i.complete&&!i.naturalWidth}).length].join(' ')}</script>"
    )
    (tmp_path / "frame.html").write_text(frame)
    words = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files", "--dump-dom"]
    words += [f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", "--virtual-time-budget=5000"]
    run = subprocess.run([*words, f"file://{tmp_path / 'frame.html'}"], capture_output=True, text=True, timeout=120)
    found = re.search(r"<pre id=\"o\">(\d+) (\d+) (\d+) (\d+)</pre>", run.stdout)
    assert found, run.stdout[-500:] + run.stderr[-500:]
    wide, window, n_pictures, n_broken = map(int, found.groups())
    assert wide <= window
    assert n_pictures > 20
    assert n_broken == 0
    assert "CONSOLE" not in run.stderr
