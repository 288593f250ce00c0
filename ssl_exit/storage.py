"""Models on disk: a folder of safetensors and JSON. Nothing in it is executed when it is read.

model.json            parameters, exit points, certificate, and a checksum of every file
encoder.safetensors   the encoder's weights
exits.safetensors     rules, final centroids, thresholds, stage times
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ssl_exit.errors import InputError

FORMAT = 6
WEIGHTS, EXITS, ABOUT = "encoder.safetensors", "exits.safetensors", "model.json"


def check_model_folder(folder: Path) -> None:
    """Refuse a folder that a model may not take the place of.

    Raises:
        InputError: it is a file, or holds anything that is not a model's, such as weights alone.
    """
    found = {f.name for f in folder.iterdir()} if folder.is_dir() else set()
    if (folder.exists() and not folder.is_dir()) or (found and (ABOUT not in found or found - {WEIGHTS, EXITS, ABOUT})):
        raise InputError(f"{str(folder)!r} exists and is not just a model; give a new folder")


def check_file(file: Path) -> None:
    """Refuse to write over what is no file.

    Raises:
        InputError: it is a folder, a device or the like.
    """
    if file.exists() and not file.is_file():
        raise InputError(f"{str(file)!r} exists and is no regular file; give another name")


def write_model(folder: Path, about: dict[str, Any], weights: dict[str, Tensor], exits: dict[str, Tensor]) -> None:
    """Write a model; the folder appears whole or not at all.

    Args:
        folder: a new one, or a model to replace.
        about: what is not a tensor, for JSON; numpy's numbers and torch's devices are made plain.
        weights: the encoder's state dict.
        exits: everything else.

    Raises:
        InputError: see `check_model_folder`.
    """
    check_model_folder(folder)
    about = {"format": FORMAT, "version": version("ssl-exit")} | json.loads(json.dumps(about, default=_plain))
    with _whole_folder(folder) as draft:
        for name, tensors in ((WEIGHTS, weights), (EXITS, exits)):
            save_file({k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}, draft / name)
        about["sha256"] = {name: _sha256(draft / name) for name in (WEIGHTS, EXITS)}
        about["checksum"] = _checksum(about)
        (draft / ABOUT).write_text(json.dumps(about, indent=1) + "\n")


def read_model(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    """What `write_model` wrote: about, weights, exits.

    Raises:
        InputError: the folder is no model, truncated, changed since it was written, or of a newer format.
    """
    about = _read_about(folder)
    for name in (WEIGHTS, EXITS):
        if not (folder / name).is_file() or _sha256(folder / name) != about["sha256"][name]:
            raise InputError(f"model {str(folder)!r}: {name} is missing, truncated or changed since it was saved")
    return about, load_file(folder / WEIGHTS), load_file(folder / EXITS)


def _read_about(folder: Path) -> dict[str, Any]:
    try:
        about = json.loads((folder / ABOUT).read_text())
    except FileNotFoundError as error:
        raise InputError(f"{str(folder)!r} is no model: it has no model.json; see ExitClusterer.save") from error
    except (OSError, ValueError) as error:
        raise InputError(
            f"model {str(folder)!r}: model.json cannot be read ({error}); it is truncated or damaged"
        ) from error
    if not isinstance(about, dict) or not isinstance(about.get("format"), int):
        raise InputError(f"{str(folder)!r} is no model of ssl_exit: model.json names no format")
    if about["format"] != FORMAT:
        remedy = "upgrade ssl_exit" if about["format"] > FORMAT else "fit it again"
        raise InputError(
            f"model {str(folder)!r} has format {about['format']}, written by ssl_exit {about.get('version')}; this "
            f"version reads format {FORMAT}: {remedy}"
        )
    if about.pop("checksum", None) != _checksum(about):
        raise InputError(f"model {str(folder)!r}: model.json was changed since it was saved; save the model again")
    return about


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, torch.device):
        return str(value)
    raise InputError(f"{value!r} cannot be saved: parameters must be numbers, strings or lists of them")


def _sha256(file: Path) -> str:
    with file.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _checksum(about: dict[str, Any]) -> str:
    """Of the JSON itself, against damage; it is no signature."""
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


@contextmanager
def _whole_folder(folder: Path) -> Iterator[Path]:
    """A draft beside the folder that takes its place when all is written, and vanishes if anything fails."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    old = draft.with_name(draft.name + "-old")
    try:
        yield draft
        draft.chmod(0o755)
        if folder.exists():
            os.replace(folder, old)
        os.replace(draft, folder)
    except BaseException:
        if old.exists() and not folder.exists():
            os.replace(old, folder)
        raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def whole_file(file: Path) -> Iterator[Path]:
    """A draft beside a file that takes its place when all is written, and vanishes if anything fails."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{file.name}-", suffix=file.suffix, dir=file.parent)
    os.close(handle)
    draft = Path(name)
    try:
        yield draft
        draft.chmod(0o644)
        os.replace(draft, file)
    finally:
        draft.unlink(missing_ok=True)
