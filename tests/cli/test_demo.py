"""The main job, as the README gives it, with what it must reach."""

import csv
import json

import pytest
from PIL import Image

from ssl_exit import load
from ssl_exit.cli import main

pytestmark = pytest.mark.slow  # a training


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    main(["demo", "--out", str(folder), "--seed", "0"])
    return folder


def test_it_reaches_what_is_promised(out):
    report = json.loads((out / "report.json").read_text())
    assert report["agreement"] >= 0.97
    assert report["cost_macs"] <= 0.5
    assert report["acc"] >= 0.80
    assert abs(report["acc"] - report["acc_full"]) <= 0.02
    assert {"cost_time", "nmi", "ari", "seconds"} <= set(report)
    assert sum(row["share"] for row in report["exits"]) == pytest.approx(1)


def test_it_writes_what_it_says(out):
    report = json.loads((out / "report.json").read_text())
    with (out / "labels.csv").open() as f:
        rows = list(csv.DictReader(f))
    assert len(rows) == report["n"]
    shares = {row["name"]: row["share"] for row in report["exits"]}
    for name, share in shares.items():
        assert sum(row["exit"] == name for row in rows) == round(share * len(rows))
    assert Image.open(out / "exits.png").size[0] > 1000


def test_the_model_it_writes_clusters_a_folder(out, image_folder, tmp_path):
    clusterer = load(out / "model")
    labels = clusterer.predict(image_folder)
    assert clusterer.exit_names_[0] == "block2.relu"
    digits = labels.reshape(10, 6)  # sorted by digit
    assert sum((row == row[2]).sum() for row in digits) > 40
