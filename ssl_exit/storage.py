"""Models on disk: a folder of safetensors and JSON. Nothing in it is executed when it is read.

model.json            settings, exit points, certificate, and a checksum of every file
encoder.safetensors   the encoder's weights
exits.safetensors     rules, fronts, final centroids, thresholds, stage times
"""

import copy
import hashlib
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from threading import get_ident
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.modules.module import register_module_buffer_registration_hook, register_module_module_registration_hook

from ssl_exit import __version__
from ssl_exit.data.preprocessing import Transform
from ssl_exit.encoders.build import EncoderSpec
from ssl_exit.encoders.graph import as_module
from ssl_exit.encoders.head import with_head
from ssl_exit.encoders.huggingface import FAMILIES
from ssl_exit.errors import InputError, shown
from ssl_exit.files import atomic_folder, file_hash, remove_abandoned, write_tensors
from ssl_exit.model import Model
from ssl_exit.settings import Settings

FORMAT = 10
WEIGHTS, EXITS, ABOUT = "encoder.safetensors", "exits.safetensors", "model.json"
PATH_SETTINGS = 100  # of the threshold path that are saved
MODEST = 256  # a number in options of an encoder that takes no time and memory to speak of
MOST_BUFFERS = 1 << 24  # numbers in buffers that stand in no weights file, such as masks
LONGEST = 1000  # letters of a message about what stands in a model


def save_model(folder: Path, model: Model) -> None:
    """Write a model; the folder appears complete or not at all.

    Args:
        folder: a new one, or a model to replace.
        model: a fitted one; its threshold path is thinned to 100 settings.

    Raises:
        InputError: the folder exists and holds anything that is not a model's.
        OSError: it cannot be written, such as on a full disk.
    """
    check_model_folder(folder)
    few = np.unique(np.linspace(0, len(model.path) - 1, PATH_SETTINGS).round().astype(int))
    about, tensors = replace(model, path=model.path[few], path_disagreement=model.path_disagreement[few]).state()
    about = {"format": FORMAT, "version": __version__} | json.loads(json.dumps(about, default=_plain))
    with atomic_folder(folder) as draft:
        for name, named in ((WEIGHTS, model.encoder.state_dict()), (EXITS, tensors)):
            write_tensors(draft / name, named)
        about["sha256"] = {name: file_hash(draft / name) for name in (WEIGHTS, EXITS)}
        about["checksum"] = _checksum(about)
        (draft / ABOUT).write_text(json.dumps(about, indent=1) + "\n")


@dataclass(frozen=True)
class Supplied:
    """What a model was fitted with and does not hold: objects that whoever loads it passes again.

    Attributes:
        encoder, front, head, transform, trust: as in `ssl_exit.load`.
    """

    encoder: nn.Module | Sequence[nn.Module] | None = None
    front: nn.Module | None = None
    head: Callable[[Any], Any] | None = None
    transform: Transform | None = None
    trust: str | None = None


def load_model(
    folder: str | Path, supplied: Supplied | None = None, device: str = "auto", **changes: Mapping[str, Any]
) -> Model:
    """Read a model that `save_model` wrote; errors are those of `ssl_exit.load`.

    Args:
        folder: the model.
        supplied: what it does not hold.
        device: where to run.
        changes: fields of groups of settings to replace, such as runtime={"compile": True}.
    """
    folder, supplied = Path(folder), supplied or Supplied()
    remove_abandoned(folder)
    before = _identity(folder)
    try:
        return _read_model(folder, supplied, device, changes)
    except InputError:
        if _identity(folder) == before:
            raise
        return _read_model(folder, supplied, device, changes)  # another process has saved meanwhile


def _identity(folder: Path) -> int | None:
    return folder.stat().st_ino if folder.exists() else None


def _read_model(folder: Path, supplied: Supplied, device: str, changes: Mapping[str, Mapping[str, Any]]) -> Model:
    encoder, head, trust = supplied.encoder, supplied.head, supplied.trust
    about = _read_about(folder)
    network = None if encoder is None else copy.deepcopy(as_module(encoder)).cpu().eval()
    with _described_by(folder):
        for name in (WEIGHTS, EXITS):
            if not (folder / name).is_file() or file_hash(folder / name) != about["sha256"][name]:
                raise InputError(f"model {str(folder)!r}: {name} is missing, truncated or changed since it was saved")
        spec = about["encoder"]["spec"] and EncoderSpec(**about["encoder"]["spec"])
        if spec and (spec.weights or spec.prefix):
            raise TypeError(f"the encoder is {spec!r:.80}")
        weights = load_file(folder / WEIGHTS)
        if network is None:
            network = _built(folder, spec, weights, about["encoder"]["class"], trust)
        elif spec and spec.foreign and spec.name != trust:
            about["encoder"]["spec"] = None  # what was passed is used; a name that nobody trusts is not kept
        settings = replace(Settings.from_dict(about["settings"]), device=str(device)).nested(**changes)
        if (head is not None) != about["encoder"]["head"]:
            raise InputError(
                f"model {str(folder)!r} was fitted {'with' if head is None else 'without'} a head: "
                + ("load(folder, head=that module or callable)" if head is None else "leave head out")
            )
        if head is not None:
            network = with_head(network, head, settings.k)
        try:
            network.load_state_dict(weights)
        except RuntimeError as error:
            raise InputError(f"the encoder does not fit model {str(folder)!r}: {error}") from error
        model = Model.from_state(
            network, about, load_file(folder / EXITS), settings, supplied.front, supplied.transform
        )
        certificate = model.check()
    if certificate.void:
        warnings.warn(f"model {str(folder)!r}: the certificate is {certificate}", stacklevel=4)
    return model


def _built(
    folder: Path, spec: EncoderSpec | None, weights: Mapping[str, Tensor], kind: str, trust: str | None
) -> nn.Module:
    """The encoder that a model names, with any weights.

    Raises:
        InputError: it names none, or code that the caller does not trust.
    """
    if spec is None:
        raise InputError(
            f"model {str(folder)!r} was fitted with a {kind} passed as an object: "
            "load(folder, encoder=that module or callable)"
        )
    name = spec.name
    if spec.foreign and name != trust:
        raise InputError(
            f"model {str(folder)!r} asks to import and call {name!r}, which could run anything. If you know that code, "
            f"say so: load(folder, trust={name!r}) or --trust {name}; or pass the encoder: load(folder, encoder=...)"
        )
    if name.startswith("transformers:") and name.partition(":")[2] not in FAMILIES:
        raise ValueError(f"{name!r} is no class that a model names")  # it would be looked for on the hub
    if spec.options and not spec.imported:
        shapes = {key: value.shape for key, value in weights.items()}
        under = {key.removeprefix("encoder."): shape for key, shape in shapes.items()}  # where a head stands on it
        _check_options(spec, under | shapes)
    with torch.random.fork_rng(devices=[]):  # weights drawn here are replaced
        return spec.build().cpu()


def _check_options(spec: EncoderSpec, shapes: Mapping[str, torch.Size]) -> None:
    """Refuse options that ask for another network than there are weights for, before it takes time and memory.

    Raises:
        ValueError: they do.
    """
    sides = (side for shape in shapes.values() if shape.numel() for side in shape)
    largest = max(MODEST, len(shapes), *sides)
    fits = all(_total(value) <= 4 * largest for value in (spec.options or {}).values())
    if fits:
        numbers = sum(shape.numel() for shape in shapes.values())
        with torch.device("meta"), _bounded(20 * len(shapes) + 1000, 4 * numbers + MOST_BUFFERS):
            fits = all(shapes.get(key) == value.shape for key, value in spec.build().state_dict().items())
    if not fits:
        raise ValueError(f"the weights are not those of {spec.name} with {shown(spec.options)}")


@contextmanager
def _bounded(n_modules: int, n_numbers: int) -> Iterator[None]:
    """Refuse to make more modules, or numbers in buffers, than so many in here.

    Raises:
        ValueError: there are more.
    """
    room, thread = {"modules": n_modules, "numbers in buffers": n_numbers}, get_ident()

    def take(what: str, count: int) -> None:
        room[what] -= count if get_ident() == thread else 0
        if room[what] < 0:
            raise ValueError(f"its options ask for more {what} than its weights could fill")

    hooks = (
        register_module_module_registration_hook(lambda *new: take("modules", 1)),
        register_module_buffer_registration_hook(
            lambda *new: take("numbers in buffers", 0 if new[2] is None else new[2].numel())
        ),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _total(value: Any) -> float:
    """Sum of all numbers in an option."""
    if isinstance(value, Mapping):
        return _total(list(value.values()))
    return sum(map(_total, value)) if isinstance(value, list) else abs(value) if isinstance(value, (int, float)) else 0


@contextmanager
def _described_by(folder: Path) -> Iterator[None]:
    """Whatever goes wrong in here is because model.json or the tensors are not what was saved."""
    try:
        yield
    except InputError as error:
        if len(str(error)) > LONGEST:
            raise InputError(f"{str(error)[:LONGEST]} ...") from error
        raise
    except Exception as error:  # of any type: the content is of anybody's making
        reason = f"{type(error).__name__}: {error}".partition("\n")[0][:LONGEST]
        raise InputError(f"model {str(folder)!r} does not describe a model ({reason}); fit it again") from error


def check_model_folder(folder: Path) -> None:
    """Refuse a folder that a model may not replace.

    Raises:
        InputError: it is a file, or holds anything that is not a model's, such as weights alone.
    """
    names = {f.name for f in folder.iterdir()} if folder.is_dir() else set()
    if (folder.exists() and not folder.is_dir()) or (names and (ABOUT not in names or names - {WEIGHTS, EXITS, ABOUT})):
        raise InputError(f"{str(folder)!r} exists and is not just a model; choose a new folder")


def _read_about(folder: Path) -> dict[str, Any]:
    try:
        about = json.loads((folder / ABOUT).read_text())
    except FileNotFoundError as error:
        raise InputError(f"{str(folder)!r} is no model: it has no model.json; see ExitClusterer.save") from error
    except (OSError, ValueError, RecursionError) as error:
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
    raise InputError(f"{value!r} cannot be saved: parameters must be numbers, strings or lists of them")


def _checksum(about: dict[str, Any]) -> str:
    """Of the JSON itself, against damage; it is no signature."""
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
