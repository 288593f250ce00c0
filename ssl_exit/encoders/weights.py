"""Weights files: read without running anything in them, searched for the encoder's part, and filled in strictly."""

import argparse
import importlib
import pickle
import re
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path, PosixPath
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ssl_exit.errors import InputError, shown

OWN_STAGES = re.compile(r"staged\.stages\.\d+\.")  # in checkpoints of `train`
PREFIXES = (
    "backbone.",
    "encoder.",
    "tapped.",
    "module.",
    "model.",
    "encoder_q.",
    "module.encoder_q.",
    "teacher.backbone.",
    "teacher.",
    "student.",
    "",
)  # preferred, where several would do
DEPTH = 6  # of mappings inside each other in which state dicts are looked for
ENTRIES = 1_000_000  # of these mappings, one that is in several places counted in each
LETTERS = 100  # of a name that count as one entry more
LISTED = 6  # prefixes that a message names

# What checkpoints hold beside tensors and is only data: reading it calls nothing but the class, which keeps it.
HARMLESS = (
    "omegaconf:DictConfig",
    "omegaconf:ListConfig",
    "omegaconf.base:ContainerMetadata",
    "omegaconf.base:Metadata",
    "omegaconf.nodes:AnyNode",
    "omegaconf.nodes:BooleanNode",
    "omegaconf.nodes:FloatNode",
    "omegaconf.nodes:IntegerNode",
    "omegaconf.nodes:StringNode",
    "collections:defaultdict",
    "typing:Any",
    "builtins:dict",
    "builtins:list",
    "builtins:int",
)
Convert = Callable[[dict[str, Tensor], nn.Module], dict[str, Tensor]]


def read_state_dict(file: Path) -> dict[str, Tensor]:
    """All tensors in a .safetensors or torch file by dotted names, those of state dicts inside it ("student",
    "teacher", "model", ...) under their names, those of "state_dict" under none; nothing in the file is executed.

    Raises:
        InputError: the file is missing, truncated, or holds no tensors by name, or more than a million entries.
    """
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        _check_stored(file)
        with _harmless_classes():
            state = torch.load(file, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except pickle.UnpicklingError as error:
        raise InputError(
            f"weights file {str(file)!r} is damaged, or holds more than tensors and is not read, because that would "
            "run code in it; export its state dict as safetensors where it was written"
        ) from error
    except Exception as error:
        raise InputError(f"weights file {str(file)!r} cannot be read: {error}; expected a state dict") from error
    state = dict.get(state, "state_dict", state) if isinstance(state, dict) else state
    tensors = _tensors(state, file) if isinstance(state, dict) else {}
    if not tensors:
        raise InputError(f"weights file {str(file)!r} holds no state dict (names to tensors)")
    return tensors


def _tensors(state: dict[Any, Any], file: Path) -> dict[str, Tensor]:
    """Tensors in dictionaries inside each other, by dotted names. Other mappings, such as omegaconf's, compute their
    values where they are read, and hold none.

    Raises:
        InputError: too many entries.
    """
    tensors: dict[str, Tensor] = {}
    walked, n_entries = [("", state, DEPTH)], 0
    for prefix, mapping, depth in walked:
        for key, value in dict.items(mapping):  # a file may give an OrderedDict another attribute of that name
            name = f"{prefix}{key}" if isinstance(key, (str, int)) else ""
            n_entries += 1 + len(name) // LETTERS
            if n_entries > ENTRIES:
                raise InputError(
                    f"weights file {str(file)!r} holds more than {ENTRIES} entries, or names as long; expected the "
                    "state dict of an encoder"
                )
            if not name:
                continue
            if isinstance(value, Tensor):
                tensors[name] = value
            elif isinstance(value, dict) and depth > 1:
                walked.append((f"{name}.", value, depth - 1))
    return tensors


@contextmanager
def _harmless_classes() -> Iterator[None]:
    """Let torch's restricted unpickler make objects of classes that only keep data."""
    known = torch.serialization.get_safe_globals()
    classes: list[Any] = [argparse.Namespace, PosixPath]
    for name in HARMLESS:
        module, _, attribute = name.partition(":")
        try:
            classes.append(getattr(importlib.import_module(module), attribute))
        except ImportError:  # a file with these needs the package; torch says which class it refuses
            continue
    torch.serialization.add_safe_globals(classes)
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(known)


def _check_stored(file: Path) -> None:
    """Refuse a torch file whose content would take more memory than the file: torch stores without compressing."""
    if not zipfile.is_zipfile(file):
        return
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
    size = file.stat().st_size
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries) or sum(e.file_size for e in entries) > size:
        raise InputError(
            f"weights file {str(file)!r} holds compressed entries, which torch never writes, and is not unpacked"
        )


def fill(
    encoder: nn.Module,
    file: Path,
    name: str,
    *,
    classifier: str | None = None,
    prefix: str | None = None,
    convert: Convert | None = None,
) -> None:
    """Fill an encoder with the weights in a file, strictly.

    Args:
        encoder: changed in place.
        file: .safetensors, or what torch.save wrote.
        name: of the encoder, for messages.
        classifier: name of a layer that was removed from the encoder, whose keys may be left over.
        prefix: of the encoder's keys in the file; None finds it.
        convert: a state dict that does not fit to one that does, such as with position embeddings resampled.

    Raises:
        InputError: see `read_state_dict`; no such prefix; or keys, shapes or types that do not fit.
    """
    own = encoder.state_dict()
    state = {OWN_STAGES.sub("", key): value for key, value in read_state_dict(file).items()}
    if prefix is not None and not any(key.startswith(prefix) for key in state):
        raise InputError(f"weights file {str(file)!r} has no keys under {prefix!r}; {_prefixes(state, set(own))}")
    prefix = _prefix(state, set(own), file) if prefix is None else prefix
    part = {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}
    if convert and (not set(own) <= set(part) or _misfits(part, own)):
        with suppress(Exception):  # it was made for other files: what does not fit is listed below
            part = convert(part, encoder)
    if classifier:
        part = {key: value for key, value in part.items() if not key.startswith(classifier + ".") or key in own}
    missing, unexpected = sorted(set(own) - set(part)), sorted(set(part) - set(own))
    missing = [key for key in missing if not key.endswith("num_batches_tracked")]
    misfits = _misfits(part, own)
    if missing or unexpected or misfits:
        where = f" under {shown(prefix)}" if prefix else ""
        raise InputError(
            f"weights file {str(file)!r} does not fit {name}{where}: missing keys {shown(missing)}; unexpected keys "
            f"{shown(unexpected)}; shapes and types {shown(misfits)}; {_prefixes(state, set(own))}"
        )
    both = [key for key in own if key in part]
    if others := sorted({str(part[k].dtype) for k in both if part[k].dtype != own[k].dtype}):
        warnings.warn(f"weights file {str(file)!r} holds {', '.join(others)}; used as float32", stacklevel=5)
    encoder.load_state_dict(part, strict=False)


def n_matching(encoder: nn.Module, file: Path) -> int:
    """How many of an encoder's keys a file has under one prefix."""
    return max(_counts(read_state_dict(file), set(encoder.state_dict())).values())


def _misfits(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> list[str]:
    """Keys of both whose shapes or types differ, or that are not dense, in words."""
    kinds = {key: _kind(state[key]) for key in own if key in state}
    words = [f"{key}: {kind}, not a dense tensor" for key, kind in kinds.items() if kind]
    both = [key for key, kind in kinds.items() if not kind]
    shapes = [key for key in both if state[key].shape != own[key].shape]
    words += [f"{key}: {tuple(state[key].shape)}, not {tuple(own[key].shape)}" for key in shapes]
    return words + [f"{k}: {state[k].dtype}, not {own[k].dtype}" for k in both if not _castable(state[k], own[k])]


def _kind(tensor: Tensor) -> str:
    """How a tensor holds its values where it does not do so densely, else ""."""
    if tensor.is_meta or tensor.is_quantized:
        return "meta" if tensor.is_meta else "quantized"
    return "" if tensor.layout is torch.strided else str(tensor.layout)


def _castable(stored: Tensor, own: Tensor) -> bool:
    """Whether weights of one type may fill those of another: floating point of 16 bits or more, or the same type."""
    floats = stored.dtype.is_floating_point and own.dtype.is_floating_point and stored.dtype.itemsize > 1
    return floats or stored.dtype == own.dtype


def _counts(state: Mapping[str, Tensor], own: set[str]) -> Counter[str]:
    """How many of the encoder's own keys are under each prefix, of usual prefixes also if none is."""
    counts = Counter({prefix: 0 for prefix in PREFIXES if any(key.startswith(prefix) for key in state)})
    depth = max((key.count(".") for key in own), default=0) + 1
    for key in state:
        parts = key.rsplit(".", depth)
        tails = (".".join(parts[i:]) for i in range(len(parts)))
        counts.update(key.removesuffix(tail) for tail in tails if tail in own)
    return counts


def _prefix(state: Mapping[str, Tensor], own: set[str], file: Path) -> str:
    """The prefix under which most of the encoder's own keys are; of several that are equal (an encoder and its moving
    average), the most usual. What lies beside it, such as projection heads, is left out.

    Raises:
        InputError: two unusual ones are equal.
    """
    counts = _counts(state, own)

    def merit(prefix: str) -> tuple[int, int, int]:
        usual = PREFIXES.index(prefix) if prefix in PREFIXES else len(PREFIXES)
        return counts[prefix], -usual, -len(prefix)

    best, second, *_ = *sorted(counts, key=merit, reverse=True), ""
    if counts[best] == counts[second] > 0 and best not in PREFIXES:
        raise InputError(
            f"weights file {str(file)!r} holds the encoder under {shown(best)} and under {shown(second)}: name the one "
            "you want (--weights-prefix)"
        )
    return best


def _prefixes(state: Mapping[str, Tensor], own: set[str]) -> str:
    """Which prefixes hold how many of the encoder's keys, for a message."""
    counts = _counts(state, own)
    best = sorted((p for p, count in counts.items() if count), key=lambda p: (-counts[p], p))[:LISTED]
    if not best:
        return f"none of its {len(state)} keys, such as {shown(next(iter(state)))}, is one of the encoder's"
    listed = ", ".join(f"{shown(prefix)} {counts[prefix]}" for prefix in best)
    return f"of the encoder's {len(own)} keys it has under the prefix {listed}"
