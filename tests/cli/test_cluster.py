"""One command from a folder to a page, continued after a stop."""

import csv
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from ssl_exit import ExitClusterer, load
from ssl_exit.cli import main
from ssl_exit.cli.cluster import ENCODER
from ssl_exit.data.image_files import FolderImages
from ssl_exit.encoders.small import digits_encoder

OPTIONS = ["--encoder", "ssl_exit.encoders.small:digits_encoder", "--size", "8", "--mean", "[0.0]", "--std", "[1.0]",
           "-k", "3", "--max-disagreement", "0.4", "--confidence", "0.5", "--device", "cpu"]  # fmt: skip


def rows(file: Path) -> list[dict[str, str]]:
    with file.open() as f:
        return list(csv.DictReader(f))


@pytest.mark.parametrize("front", [False, True])
def test_from_a_folder_to_a_page(front, image_folder, tmp_path, capsys):
    out = tmp_path / "out"
    extra = ["--front", "auto", "--front-epochs", "1", "--front-width", "4"] if front else []
    main(["cluster", str(image_folder), "-o", str(out), *OPTIONS, *extra])
    printed = capsys.readouterr().out
    assert "60 images clustered" in printed
    assert "exits pay" in printed or "exits do not pay here" in printed
    names = {file.name for file in out.iterdir()}
    assert names - {"labels.parquet"} == {"labels.csv", "model", "report.html", "report.json", "run.json"}
    labels = load(out / "model").predict(str(image_folder))
    assert [int(row["label"]) for row in rows(out / "labels.csv")] == labels.tolist()
    if "labels.parquet" in names:
        table = pytest.importorskip("pyarrow.parquet").read_table(out / "labels.parquet").to_pydict()
        assert table["label"] == labels.tolist()
        assert table["path"] == FolderImages(image_folder, load(out / "model").preprocessing).paths
    report = json.loads((out / "report.json").read_text())
    assert report["n"] == 12  # a fifth is held out


def test_it_goes_on_where_it_stopped(image_folder, tmp_path, capsys, monkeypatch):
    out, words = tmp_path / "out", ["cluster", str(image_folder), "-o", str(tmp_path / "out"), *OPTIONS]
    fits, runs = [], []
    fit, stream = ExitClusterer.fit, ExitClusterer.stream

    def counted_fit(self, *args, **kwargs):
        fits.append(1)
        return fit(self, *args, **kwargs)

    def stopped_stream(self, *args, **kwargs):
        runs.append(1)
        if len(runs) == 1:
            raise KeyboardInterrupt
        return stream(self, *args, **kwargs)

    monkeypatch.setattr(ExitClusterer, "fit", counted_fit)
    monkeypatch.setattr(ExitClusterer, "stream", stopped_stream)
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 130
    main(words)
    main(words)  # only the page is written again
    assert (len(fits), len(runs)) == (1, 2)
    assert "12 images held out from fitting" in capsys.readouterr().out
    time.sleep(0.01)
    (image_folder / "0" / "new.png").write_bytes(next((image_folder / "1").iterdir()).read_bytes())
    main(words)
    assert (len(fits), len(runs)) == (1, 3)
    assert "12 images of a folder that changed since the fit" in capsys.readouterr().out
    assert len(rows(out / "labels.csv")) == 61
    main([*words, "--num-workers", "0", "--compile", "false"])
    assert (len(fits), len(runs)) == (1, 3)
    shutil.rmtree(out / "model")
    main(words)
    assert (len(fits), len(runs)) == (2, 4)  # labels are those of the model
    precision = ["--precision", "bfloat16"]
    for changed, name in (["-k", "4"], "settings"), (["--size", "16"], "preprocessing"), (precision, "settings"):
        with pytest.raises(SystemExit):
            main([*words, *changed])
        assert f"holds results of other {name}; choose a new folder" in capsys.readouterr().err
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("dear")
    with pytest.raises(SystemExit):
        main(["cluster", str(image_folder), "-o", str(tmp_path / "full"), *OPTIONS])
    assert "exists and holds something else" in capsys.readouterr().err


def test_what_failed_does_not_block_its_folder(image_folder, tmp_path, capsys):
    words, weights = ["cluster", str(image_folder), "-o", str(tmp_path / "out"), *OPTIONS], tmp_path / "w.pt"
    with pytest.raises(SystemExit):
        main([*words, "-k", "1000"])
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["run.json"]
    torch.save(digits_encoder().state_dict(), weights)
    main([*words, "--weights", str(weights), "--holdout", "0"])
    assert "images that were fitted" in capsys.readouterr().out
    torch.save(digits_encoder().state_dict(), weights)
    with pytest.raises(SystemExit):
        main([*words, "--weights", str(weights), "--holdout", "0"])
    assert "holds results of other weights; choose a new folder" in capsys.readouterr().err


def test_the_default_encoder_needs_one_file_where_there_is_no_network(image_folder, tmp_path, capsys, monkeypatch):
    timm = pytest.importorskip("timm")

    def unreachable(*args, **kwargs):
        raise OSError("no route")

    monkeypatch.setattr(timm, "create_model", unreachable)
    with pytest.raises(SystemExit) as stop:
        main(["cluster", str(image_folder), "-o", str(tmp_path / "out")])
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert f"encoder '{ENCODER}' cannot be had (OSError: no route)" in message
    assert "download model.safetensors of timm/vit_small_patch14_dinov2.lvd142m" in message
    assert "--weights FILE" in message


def test_a_report_of_a_model(image_folder, tmp_path, capsys):
    main(["fit", "--data", str(image_folder), "--out", str(tmp_path / "model"), *OPTIONS])
    printed = capsys.readouterr()
    assert "exits pay" in printed.out or "exits do not pay here" in printed.out
    main(["report", "--model", str(tmp_path / "model"), "--data", str(image_folder), "-o", str(tmp_path / "r.html")])
    assert "Clusters and classes" in (tmp_path / "r.html").read_text()


def test_predict_on_standard_output_and_embeddings(image_folder, tmp_path, capsys):
    main(["fit", "--data", str(image_folder), "--out", str(tmp_path / "model"), *OPTIONS])
    capsys.readouterr()
    words = ["predict", "--model", str(tmp_path / "model"), "--data", str(image_folder)]
    main([*words, "--out", "-", "--embeddings", str(tmp_path / "z.npy")])
    printed = capsys.readouterr()
    main([*words, "--out", str(tmp_path / "labels.csv"), "--quiet"])
    assert printed.out == (tmp_path / "labels.csv").read_text()
    assert "60 images clustered" in printed.err
    assert capsys.readouterr().out == ""
    expected = load(tmp_path / "model").embed(str(image_folder))
    np.testing.assert_array_equal(np.load(tmp_path / "z.npy"), expected)
    with pytest.raises(SystemExit):
        main([*words, "--embeddings", str(tmp_path / "z.csv")])
    assert "final features are written as .npy" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["predcit"], "no command 'predcit'; did you mean 'predict'?"),
        (["xyz"], "no command 'xyz'; choose one of"),
        (["fit", "--n-cluster", "3"], "ssl-exit fit has no option --n-cluster; did you mean --n-clusters?"),
        (["predict", "--modle=m"], "ssl-exit predict has no option --modle; did you mean --model?"),
        (["fit", "--qqqqqq"], "has no option --qqqqqq; --help lists all"),
        (["--print-completion", "fish!"], "--print-completion takes one of"),
    ],
)
def test_typing_errors_are_told_from_what_was_meant(words, message, capsys):
    if words[0].startswith("--print"):
        pytest.importorskip("shtab")
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_completion_knows_commands_and_options(capsys):
    pytest.importorskip("shtab")
    main(["--print-completion", "bash"])
    script = capsys.readouterr().out
    for word in ("cluster", "predict", "--n_clusters", "--max_disagreement"):
        assert word in script


def test_too_few_images_are_said_before_the_work(image_folder, tmp_path, capsys, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("ssl_exit.clusterer.estimator.fit", interrupted)
    with (
        pytest.warns(UserWarning, match=r"of 60 images 9 are held out .* which takes at least 149: give at least 994"),
        pytest.raises(SystemExit),
    ):
        main(["fit", "--data", str(image_folder), "--out", str(tmp_path / "model"), *OPTIONS[:-6], "--device", "cpu"])


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_progress_is_seen_on_a_terminal_and_nowhere_else(image_folder, tmp_path):
    import pty
    import termios

    words = [
        sys.executable,
        "-c",
        "from ssl_exit.cli import main; main()",
        "fit",
        "--data",
        str(image_folder),
        *OPTIONS,
    ]
    words += ["--batch-size", "8", "--out", str(tmp_path / "model")]
    plain = subprocess.run(words, capture_output=True, text=True)
    assert plain.returncode == 0
    assert "%|" not in plain.stderr
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=theirs) as run:
        os.close(theirs)
        seen = b""
        try:
            while block := os.read(ours, 4096):
                seen += block
        except OSError:  # the end, as Linux tells it
            pass
    os.close(ours)
    assert run.returncode == 0
    assert b"fit" in seen
    assert b"100%|" in seen
    assert b"img/s" in seen
