"""Processes that save, predict or train and are killed, and flipped bits in what they leave."""

import os
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from attacks.trial import Attack, digits, fitted, must
from ssl_exit import files, load
from ssl_exit.cli import main as command
from ssl_exit.report.label_file import LabelFile


def kills(place: Path) -> Attack:
    """Processes that save, predict or train and are killed; the next one finds what it should."""
    images = digits()
    one, two = fitted(images[:1200]), fitted(images[:1200], n_clusters=4)
    data = place / "images"
    data.mkdir()
    for i, image in enumerate(images[:300, 0]):
        Image.fromarray((image * 255).to(torch.uint8).numpy()).save(data / f"{i:04d}.png")
    one.save(place / "model")
    steps = 250  # lines of files.py that a save runs, and more

    def predict(out: Path) -> None:
        command(["predict", "--model", str(place / "model"), "--data", str(data), "--out", str(out)])

    def train(out: Path) -> None:
        words = ["--encoder", "digits_cnn", "--data", "digits", "--size", "8", "--mean", "[0.0]", "--std", "[1.0]"]
        words += ["--views", "drawing", "--epochs", "3", "--device", "cpu", "--precision", "32-true", "--out", str(out)]
        command(["train", *words, *(["--resume", "true"] if list(out.glob("checkpoints/*.ckpt")) else [])])

    def timed(act: Callable[[], None]) -> float:
        began = time.perf_counter()
        must(killed(act, None) == 0, "it ends when nobody kills it")
        return time.perf_counter() - began

    seconds = {
        "predict": timed(lambda: predict(place / "labels.csv")),
        "train": timed(lambda: train(place / "trained")),
    }
    seconds["save"] = timed(lambda: two.save(place / "other"))
    labels, trained = (place / "labels.csv").read_bytes(), load_file(place / "trained" / "encoder.safetensors")

    def save(rng: np.random.Generator, folder: Path) -> str:
        one.save(folder / "model")
        act = partial(two.save, folder / "model")
        if rng.integers(2):
            killed(act, None, step=int(rng.integers(steps)))
        else:
            killed(act, rng.uniform(0, seconds["save"]))
        c = load(folder / "model", device="cpu")
        must(os.listdir(folder) == ["model"], "nothing else is left")
        must(not c.certificate_.void, "the model is whole")
        which = "old" if c.n_clusters == 5 else "new"
        must(c.certificate_ == (one if which == "old" else two).certificate_, "it is the old or the new one")
        return f"the {which} model"

    def attack(rng: np.random.Generator, folder: Path) -> tuple[str, str]:
        kind = ["save", "predict", "train"][int(np.searchsorted([500 / 710, 650 / 710], rng.uniform()))]
        if kind == "save":
            return kind, save(rng, folder)
        out = folder / ("labels.csv" if kind == "predict" else "trained")
        act = partial(predict if kind == "predict" else train, out)
        for _ in range(rng.integers(1, 4)):
            killed(act, rng.uniform(0, seconds[kind]))
        must(killed(act, None) == 0, "it can be resumed")
        if kind == "predict":
            must(out.read_bytes() == labels, "the labels are those of a run that nobody killed")
            must(os.listdir(folder) == ["labels.csv"], "nothing else is left")
        else:
            again = load_file(out / "encoder.safetensors")
            must(all(torch.equal(again[k], v) for k, v in trained.items()), "the weights are those of such a run")
        return kind, "resumed to the same"

    return attack


def killed(act: Callable[[], None], seconds: float | None, step: int | None = None) -> int:
    """Do something in a forked process that is killed after some seconds, or at a line of files.py; how it ended."""
    child = os.fork()
    if child == 0:
        left = step if step is not None else 0

        def count(frame: Any, event: str, arg: Any) -> Any:
            nonlocal left
            if frame.f_code.co_filename != files.__file__:
                return None
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return count

        if step is not None:
            sys.settrace(count)
        try:
            act()
            os._exit(0)
        except SystemExit as stop:
            os._exit(0 if stop.code in (0, None) else 1)
        except BaseException:
            os._exit(3)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def drafts(place: Path) -> Attack:
    """A flipped bit in what a killed run left: the rows in the end are right."""
    images = digits()[:400]
    c = fitted(digits()[:1200])
    parts, names = [c.run(part) for part in images.split(50)], [f"{i}.png" for i in range(len(images))]
    with LabelFile(place / "whole.csv", names, c.exit_names_, "key") as labels:
        for part in parts:
            labels.add(part)
    whole = (place / "whole.csv").read_bytes()

    def attack(rng: np.random.Generator, folder: Path) -> tuple[str, str]:
        first = LabelFile(folder / "labels.csv", names, c.exit_names_, "key")
        for part in parts[: rng.integers(1, 8)]:
            first.add(part)
        first._handle.close()
        first._marks.close()
        left = [first.draft, first.marks][rng.integers(2)]
        content = bytearray(left.read_bytes())
        content[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
        left.write_bytes(content)
        with LabelFile(folder / "labels.csv", names, c.exit_names_, "key") as second:
            must(second.n_rows % 50 == 0, "it continues behind a mark")
            kept = second.n_rows
            for part in parts[kept // 50 :]:
                second.add(part)
        must((folder / "labels.csv").read_bytes() == whole, "rows behind a flipped bit were kept")
        return "flipped bit", f"right, {'some' if kept else 'no'} rows kept"

    return attack
