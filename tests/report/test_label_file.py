"""Rows of labels: whole or absent, and gone on with after a kill."""

import csv
import io
import json

import numpy as np
import pytest

from ssl_exit.cascade.result import ExitResult
from ssl_exit.errors import InputError
from ssl_exit.report.label_file import LabelFile, print_labels, write_labels

EXITS = ["early", "end"]
NAMES = ["a", "b,c", 'd"e', "f\ng", "h\u2028i", "j"]


def result_of(labels):
    n = len(labels)
    labels = np.array(labels)
    return ExitResult(labels, labels % 2, np.full(n, 0.5, np.float32), np.ones(n), {}, np.full(n, -1))


def test_a_file_is_whole_or_absent(tmp_path):
    write_labels(tmp_path / "labels.csv", list("abc"), result_of([4, -1, 3]), EXITS)
    rows = (tmp_path / "labels.csv").read_text().splitlines()
    assert rows == ["path,label,exit,score", "a,4,early,0.500000", "b,-1,,", "c,3,end,0.500000"]
    with pytest.raises(ValueError, match="zip"):
        write_labels(tmp_path / "other.csv", ["a"], result_of([1, 2]), EXITS)
    assert [f.name for f in tmp_path.iterdir()] == ["labels.csv"]


def started(file, parts):
    """A file that was killed after some parts; what is left of it, draft and marks."""
    for left in file.parent.glob(".*"):
        left.unlink()
    labels = LabelFile(file, NAMES, EXITS, "key")
    for part in parts:
        labels.add(result_of(part))
    labels._handle.close()
    labels._marks.close()
    return labels.draft, labels.marks


def read_rows(file):
    if file.suffix == ".csv":
        with file.open(newline="", encoding="utf-8", errors="surrogateescape") as f:
            return [dict(row) for row in csv.DictReader(f)]
    if file.suffix == ".jsonl":
        return [json.loads(line) for line in file.read_text().splitlines()]
    return pytest.importorskip("pyarrow.parquet").read_table(file).to_pylist()


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_other_formats_hold_the_same(suffix, tmp_path):
    names = ["a", "=b", "c\udcff"]
    file, plain = tmp_path / f"labels{suffix}", tmp_path / "labels.csv"
    write_labels(file, names, result_of([4, -1, 3]), EXITS)
    write_labels(plain, names, result_of([4, -1, 3]), EXITS)
    name = names[2] if suffix == ".jsonl" else "c\\xff"
    assert read_rows(file) == [
        {"path": "a", "label": 4, "exit": "early", "score": 0.5},
        {"path": "=b", "label": -1, "exit": None, "score": None},
        {"path": name, "label": 3, "exit": "end", "score": 0.5},
    ]
    assert [row["label"] for row in read_rows(plain)] == ["4", "-1", "3"]


def test_rows_on_a_stream_and_formats_that_are_none(tmp_path):
    stream = io.StringIO()
    print_labels(stream, ["a", "=b"], result_of([4, -1]), EXITS)
    assert stream.getvalue() == "a,4,early,0.500000\n./=b,-1,,\n"
    with pytest.raises(InputError, match=r"as \.csv, \.jsonl or \.parquet; got .*labels\.txt"):
        write_labels(tmp_path / "labels.txt", ["a"], result_of([1]), EXITS)
    with pytest.raises(InputError, match=r"as \.csv, \.jsonl or \.parquet"):
        LabelFile(tmp_path / "labels", ["a"], EXITS, "key")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_it_goes_on_behind_the_last_mark_wherever_it_was_cut(tmp_path, suffix):
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    whole, file = tmp_path / f"whole{suffix}", tmp_path / f"labels{suffix}"
    write_labels(whole, NAMES, result_of([1, 2, 3, 4, 5, 6]), EXITS)
    parts, rows = [[1, 2], [3], [4, 5, 6]], set()
    sizes = [left.stat().st_size for left in started(file, parts)]
    for which, size in enumerate(sizes):
        for cut in [*range(0, size, 3), size]:
            left = started(file, parts)[which]
            left.write_bytes(left.read_bytes()[:cut])  # as a kill would leave it
            with LabelFile(file, NAMES, EXITS, "key") as labels:
                rows.add(labels.n_rows)
                labels.add(result_of([1, 2, 3, 4, 5, 6][labels.n_rows :]))
            assert file.read_bytes() == whole.read_bytes()
            file.unlink()
            assert [f.name for f in tmp_path.iterdir()] == [whole.name]
    assert rows == {0, 2, 3, 6}


def test_nothing_behind_a_flipped_bit_is_kept(tmp_path):
    whole, file = tmp_path / "whole.csv", tmp_path / "labels.csv"
    write_labels(whole, NAMES, result_of([1, 2, 3, 4, 5, 6]), EXITS)
    parts = [[1, 2], [3], [4, 5, 6]]
    sizes = [left.stat().st_size for left in started(file, parts)]
    bits = (range(0, 8, 3), range(8))  # some of every byte of the rows, every one of the marks
    for which, place, bit in [(w, p, b) for w in (0, 1) for p in range(sizes[w]) for b in bits[w]]:
        left = started(file, parts)[which]
        content = bytearray(left.read_bytes())
        content[place] ^= 1 << bit
        left.write_bytes(content)
        with LabelFile(file, NAMES, EXITS, "key") as labels:
            assert labels.n_rows < 6
            labels.add(result_of([1, 2, 3, 4, 5, 6][labels.n_rows :]))
        assert file.read_bytes() == whole.read_bytes()
        file.unlink()


def test_cells_are_no_formulas_and_names_lose_nothing(tmp_path):
    names = ["=1+1", "+x", "-x", "@x", "\tx", "\rx", "plain", "caf\udce9.jpg"]
    write_labels(tmp_path / "labels.csv", names, result_of([1] * 8), EXITS)
    with open(tmp_path / "labels.csv", newline="", encoding="utf-8", errors="surrogateescape") as f:
        cells = [row[0] for row in csv.reader(f)][1:]
    assert cells == [*(f"./{name}" for name in names[:6]), *names[6:]]


def test_rows_of_images_that_changed_are_not_gone_on_with(tmp_path):
    file = tmp_path / "labels.csv"
    with LabelFile(file, NAMES, EXITS, "key", ["1"] * 6) as labels:
        labels.add(result_of([1, 2]))
    with LabelFile(file, NAMES, EXITS, "key", ["1"] * 6) as labels:
        assert labels.n_rows == 2
    with LabelFile(file, NAMES, EXITS, "key", ["1"] * 5 + ["2"]) as labels:
        assert labels.n_rows == 0
        labels.add(result_of([1, 2, 3, 4, 5, 6]))
    assert [f.name for f in tmp_path.iterdir()] == ["labels.csv"]  # the other draft has gone too


def test_rows_of_another_model_or_of_other_images_are_not_gone_on_with(tmp_path):
    file = tmp_path / "labels.csv"
    with LabelFile(file, NAMES, EXITS, "key") as labels:
        labels.add(result_of([1, 2]))
    assert not file.exists()  # four are missing
    for names, exits, key in ((NAMES[1:], EXITS, "key"), (NAMES, ["other", "end"], "key"), (NAMES, EXITS, "other")):
        with LabelFile(file, names, exits, key) as other:
            assert other.n_rows == 0
    with LabelFile(file, NAMES, EXITS, "key") as labels:
        assert labels.n_rows == 2


def test_what_is_no_file_is_refused_before_the_work(tmp_path):
    with pytest.raises(InputError, match="is no regular file"):
        LabelFile(tmp_path, NAMES, EXITS, "key")


def test_two_that_write_one_file_are_an_error(tmp_path):
    file = tmp_path / "labels.csv"
    first = LabelFile(file, NAMES, EXITS, "key")
    with LabelFile(file, NAMES, EXITS, "key") as second:
        with pytest.raises(InputError, match="another process writes"), first:
            first.add(result_of([1, 2, 3, 4, 5, 6]))
        second.add(result_of([1, 2, 3, 4, 5, 6]))
    assert len(file.read_text().splitlines()) > 6
