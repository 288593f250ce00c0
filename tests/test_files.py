"""Files and folders: whole or absent at every moment of a kill, with the permissions that the umask leaves."""

import os
import sys

import pytest

from ssl_exit import files
from ssl_exit.files import atomic_file, atomic_folder, remove_abandoned


def write(folder, content):
    with atomic_folder(folder) as draft:
        for name in ("a", "b"):
            (draft / name).write_text(content)


def content(folder):
    return {file.name: file.read_text() for file in folder.iterdir()}


def killed_at(step, act):
    """Run something in a process of its own that dies at a line of files.py or at a write; whether it did die."""
    child = os.fork()
    if child == 0:
        left = step

        def count(frame, event, arg):
            nonlocal left
            if frame.f_code.co_filename not in (files.__file__, __file__):
                return None
            left -= 1
            if left < 0:
                os._exit(9)
            return count

        sys.settrace(count)
        act()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


@pytest.mark.parametrize("exchange", [True, False])
def test_a_folder_is_the_old_or_the_new_one_wherever_the_process_is_killed(tmp_path, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(files, "_exchange", lambda *_: False)
    folder, seen = tmp_path / "model", set()
    old, new = (dict.fromkeys(("a", "b"), text) for text in ("old", "new"))
    step = 0
    write(folder, "old")
    while killed_at(step, lambda: write(folder, "new")):
        remove_abandoned(folder)
        assert content(folder) in (old, new)
        assert os.listdir(tmp_path) == ["model"]
        seen.add(content(folder) == new)
        write(folder, "old")
        step += 1
    assert content(folder) == new
    assert step > 25
    assert False in seen


def test_a_file_is_the_old_or_the_new_one_wherever_the_process_is_killed(tmp_path):
    file, step = tmp_path / "labels.csv", 0

    def act():
        with atomic_file(file) as draft:
            draft.write_text("new")

    file.write_text("old")
    while killed_at(step, act):
        assert file.read_text() in ("old", "new")
        file.write_text("old")
        step += 1
    assert step > 15
    act()
    assert os.listdir(tmp_path) == ["labels.csv"]
    assert file.read_text() == "new"


def test_a_draft_that_another_process_is_writing_stays(tmp_path):
    with atomic_folder(tmp_path / "model") as draft:
        (draft / "a").write_text("half")
        child = os.fork()
        if child == 0:
            write(tmp_path / "model", "quick")
            os._exit(0)
        os.waitpid(child, 0)
        assert content(tmp_path / "model") == {"a": "quick", "b": "quick"}
        assert (draft / "a").read_text() == "half"
    assert content(tmp_path / "model") == {"a": "half"}
    assert os.listdir(tmp_path) == ["model"]


def test_names_that_only_look_like_drafts_stay(tmp_path):
    names = [".model-notes", ".model-0123456", ".model-0123456g", ".other-01234567", "model-01234567"]
    for name in names:
        (tmp_path / name).mkdir()
    os.mkfifo(tmp_path / ".model-01234567")  # must not be waited for
    write(tmp_path / "model", "new")
    assert set(names) <= set(os.listdir(tmp_path))


@pytest.mark.parametrize("umask", [0o002, 0o022, 0o077])
def test_permissions_follow_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        write(tmp_path / "model", "x")
        with atomic_file(tmp_path / "file.csv") as draft:
            draft.unlink()  # as libraries do that write elsewhere and rename
            os.close(os.open(draft, os.O_CREAT, 0o600))
    finally:
        os.umask(before)
    for path in (tmp_path / "file.csv", tmp_path / "model" / "a"):
        assert path.stat().st_mode & 0o777 == 0o666 & ~umask
    assert (tmp_path / "model").stat().st_mode & 0o777 == 0o777 & ~umask
