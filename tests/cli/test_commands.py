"""The command line on a real folder, as a user types it."""

import csv
import json
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest
import yaml
from PIL import Image

from ssl_exit import ExitClusterer
from ssl_exit.cli import COMMANDS, POSITIONAL, command, main, parser_of
from ssl_exit.data.image_files import FolderImages
from ssl_exit.data.preprocessing import Preprocessing

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
GREY = Preprocessing(8, (0.0,), (1.0,))
FIT = ["fit", "--encoder", "ssl_exit.encoders.small:digits_encoder", "--size", "8", "--mean", "[0.0]", "--std", "[1.0]",
       "--n-clusters", "3", "--max-disagreement", "0.4", "--confidence", "0.5", "--device", "cpu"]  # fmt: skip


@pytest.fixture
def model(image_folder, tmp_path, capsys):
    main([*FIT, "--data", str(image_folder), "--out", str(tmp_path / "model")])
    assert "certificate: " in capsys.readouterr().out
    return tmp_path / "model"


def test_fit_predict_evaluate(model, image_folder, tmp_path, capsys):
    (image_folder / "0" / "broken.png").write_text("no image")
    Image.new("RGBA", (30, 20), "red").save(image_folder / "1" / "red.png")
    main(["predict", "--model", str(model), "--data", str(image_folder), "--out", str(tmp_path / "out" / "l.csv")])
    printed = capsys.readouterr()
    assert "61 images clustered" in printed.out
    assert "1 skipped" in printed.out
    assert "skipped 0/broken.png: UnidentifiedImageError" in printed.err
    with (tmp_path / "out" / "l.csv").open() as f:
        rows = {row["path"]: row for row in csv.DictReader(f)}
    assert len(rows) == 62
    assert rows["0/broken.png"] == {"path": "0/broken.png", "label": "-1", "exit": "", "score": ""}
    assert rows["1/red.png"]["label"] in {"0", "1", "2"}

    report = tmp_path / "report.json"
    main(["evaluate", "--model", str(model), "--data", str(image_folder), "--out", str(report)])
    printed = capsys.readouterr().out
    assert "agreement" in printed
    assert "ACC, early / full" in printed
    found = json.loads(report.read_text())
    assert found["n"] == 61
    assert found["skipped"] == 1
    assert 0 <= found["acc"] <= 1


def test_guarantee_and_audit(image_folder, tmp_path, capsys):
    out = str(tmp_path / "model")
    main([*FIT, "--data", str(image_folder), "--out", out, "--guarantee", "cluster", "--audit", "1.0"])
    assert "without the margin for chance" in capsys.readouterr().out
    main(["predict", "--model", out, "--data", str(image_folder), "--out", str(tmp_path / "labels.csv")])
    assert "audit: no drift found (" in capsys.readouterr().out
    certificate = json.loads((tmp_path / "model" / "model.json").read_text())["certificate"]
    assert certificate["guarantee"] == "cluster"
    again = ["predict", "--model", out, "--data", str(image_folder), "--out", str(tmp_path / "again.csv")]
    main([*again, "--audit", "0"])
    assert "audit:" not in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([*again, "--audit", "2"])
    assert "audit must be a number in [0, 1]" in capsys.readouterr().err


def test_evaluate_explains(model, image_folder, tmp_path, capsys):
    report = tmp_path / "report.json"
    main(["evaluate", "--model", str(model), "--data", str(image_folder), "--explain", "true", "--out", str(report)])
    printed = capsys.readouterr().out
    assert "scores 0 to 1" in printed
    assert "images exit early" in printed
    found = json.loads(report.read_text())["explanation"]
    assert found["n"] == 60
    assert sum(found["exits"][0]["histogram"]) == found["exits"][0]["reached"] == 60


def test_rules_and_their_options_by_name(image_folder, tmp_path, capsys):
    out = tmp_path / "mlp"
    main([*FIT, "--data", str(image_folder), "--out", str(out), "--rule", "mlp", "--rule-options.hidden", "4",
          "--rule-options.epochs", "1", "--thresholds", "exit", "--mirror", "true"])  # fmt: skip
    settings = json.loads((out / "model.json").read_text())["settings"]
    assert settings["rule"] == {"name": "mlp", "options": {"hidden": 4, "epochs": 1}, "mirror": True}
    assert settings["calibration"]["thresholds"] == "exit"
    assert "kept, saves" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        main([*FIT, "--data", str(image_folder), "--out", str(out), "--rule", "sdn", "--rule-options.depth", "4"])
    assert stop.value.code == 2
    assert "has no option 'depth'" in capsys.readouterr().err


def test_list_exits(capsys):
    main(["list-exits", "--encoder", "resnet20_cifar", "--size", "32"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["exit", "point", "shape", "cost"]
    assert any(line.split() == ["layer1.2.relu_1", "16x32x32", "0.360"] for line in lines)


def options(name):
    """All options of a command: its own arguments, and the fields of its groups."""
    return {action.dest for action in parser_of(name, command(name))._actions} - {"help", "config", "print_config"}


@pytest.mark.parametrize("name", COMMANDS)
def test_help_explains_every_option(name, capsys):
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert stop.value.code == 0
    printed = " ".join(capsys.readouterr().out.split())
    for option in options(name):
        assert f"--{option} " in printed or (name in POSITIONAL and f" {option} " in printed)
    assert "--config" in printed


def test_config_files_are_read_and_unknown_keys_refused(image_folder, tmp_path, capsys):
    config = tmp_path / "fit.yaml"
    settings = {
        "encoder": "ssl_exit.encoders.small:digits_encoder",
        "data": str(image_folder),
        "out": str(tmp_path / "m"),
    }
    settings |= {"size": 8, "mean": [0.0], "std": [1.0], "n_clusters": 3, "max_disagreement": 0.4, "confidence": 0.5}
    config.write_text(yaml.safe_dump(settings))
    main(["fit", "--config", str(config)])
    assert (tmp_path / "m" / "model.json").is_file()
    config.write_text(yaml.safe_dump(settings | {"n_cluster": 4}))
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", str(config)])
    assert stop.value.code == 2
    assert "n_cluster" in capsys.readouterr().err


@pytest.mark.parametrize("config", sorted(CONFIGS.glob("*.yaml")), ids=lambda f: f.name)
def test_the_configs_name_only_options_that_exist(config):
    assert set(yaml.safe_load(config.read_text())) <= options(config.stem.split("-")[0])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["list-exits", "--encoder", "resnet99"], "no encoder 'resnet99'"),
        (["fit", "--encoder", "resnet18", "--data", "x", "--out", "y"], "needs --weights"),
        (["predict", "--model", "nowhere", "--data", "x"], "is no model"),
        ([*FIT, "--data", "nowhere", "--out", "y"], "is not a folder"),
    ],
)
def test_wrong_input_ends_with_one_line_and_status_2(words, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert len(error.splitlines()) == 1


def test_an_interrupted_predict_goes_on_where_it_stopped(model, image_folder, tmp_path, monkeypatch, capsys):
    command = ["predict", "--model", str(model), "--data", str(image_folder), "--out"]
    main([*command, str(tmp_path / "whole.csv")])
    monkeypatch.setattr("ssl_exit.clusterer.estimator.PART", 1)
    stream = ExitClusterer.stream

    def interrupted(self, data, start):
        self.batch_size = 16
        yield from islice(stream(self, data, start), 2)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ExitClusterer, "stream", interrupted)
        with pytest.raises(SystemExit) as stop:
            main([*command, str(tmp_path / "l.csv")])
    assert stop.value.code == 130
    assert "interrupted" in capsys.readouterr().err
    assert not (tmp_path / "l.csv").exists()
    main([*command, str(tmp_path / "l.csv")])
    assert "continuing behind 32 rows" in capsys.readouterr().err
    assert (tmp_path / "l.csv").read_text() == (tmp_path / "whole.csv").read_text()
    assert not list(tmp_path.glob(".*.part"))


def test_rows_of_images_that_changed_are_not_kept(model, image_folder, tmp_path, monkeypatch, capsys):
    command = ["predict", "--model", str(model), "--data", str(image_folder), "--out", str(tmp_path / "l.csv")]
    monkeypatch.setattr("ssl_exit.clusterer.estimator.PART", 1)
    stream = ExitClusterer.stream

    def interrupted(self, data, start):
        self.batch_size = 16
        yield from islice(stream(self, data, start), 2)
        raise KeyboardInterrupt

    for changed in (False, True):
        with monkeypatch.context() as patch:
            patch.setattr(ExitClusterer, "stream", interrupted)
            with pytest.raises(SystemExit):
                main(command)
        if changed:
            Image.new("L", (8, 8), 200).save(image_folder / "0" / FolderImages(image_folder / "0", GREY).paths[0])
        main(command)
        assert ("continuing behind" in capsys.readouterr().err) != changed


def test_names_do_not_reach_the_terminal_as_they_are(model, image_folder, tmp_path, capsys):
    (image_folder / "0" / "\x1b[31mred\x07\udce9.png").write_text("no image")
    main(["predict", "--model", str(model), "--data", str(image_folder), "--out", str(tmp_path / "l.csv")])
    error = capsys.readouterr().err
    assert "0/\\x1b[31mred\\x07\\udce9.png" in error
    assert "\x1b" not in error
    with pytest.raises(SystemExit):
        main(["predict", "--model", "\x1b[31mnowhere", "--data", str(image_folder)])
    assert "\x1b" not in capsys.readouterr().err


@pytest.mark.slow
def test_quiet_where_there_is_no_terminal(image_folder, tmp_path):
    command = [sys.executable, "-c", "from ssl_exit.cli import main; main()"]
    done = subprocess.run(
        [*command, *FIT, "--data", str(image_folder), "--out", str(tmp_path / "m")], capture_output=True, text=True
    )
    assert done.returncode == 0
    assert done.stderr == ""
