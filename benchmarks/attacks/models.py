"""Model folders: bytes, JSON values and tensors changed."""

import copy
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from attacks.trial import PLANTED, Attack, digits, fitted, must, no_code_ran
from ssl_exit import InputError, load, storage
from ssl_exit.files import file_hash

NASTY: list[Any] = [None, True, False, 0, -1, 1, 7, 1e308, -1e308, float("nan"), float("inf"), 10**18, 10**30, 0.5, ""]
NASTY += ["os:abort", "planted:digits_encoder", "timm:resnet10t", "auto", "x" * 100_000, "\x1b[31m\x00", [], {}, [[]]]
NASTY += [{"a": 1}, [1e9] * 3, "float32", "cuda:7", list(range(5000)), "../../etc/passwd", -(2**63)]


def models(place: Path) -> Attack:
    """Bytes, JSON values and tensors of model folders."""
    images = digits()
    few = images[1200:1264]
    cases = []
    for i, how in enumerate([{}, {"rule": "mlp", "patience": 2}, {"rule": "e2cm", "front": "auto", "front_epochs": 2}]):
        c = fitted(images[:1200], **how)
        c.save(place / f"model{i}")
        cases.append((place / f"model{i}", c.predict(few)))
    (place / "planted.py").write_text(PLANTED)
    sys.path.insert(0, str(place))

    def attack(rng: np.random.Generator, folder: Path) -> tuple[str, str]:
        os.chdir(place)  # in the process of the trial
        original, expected = cases[rng.integers(len(cases))]
        shutil.copytree(original, folder / "model")
        kind = ["bytes", "description", "description", "tensors"][rng.integers(4)]
        {"bytes": damage, "description": forge_description, "tensors": forge_tensors}[kind](rng, folder / "model")
        try:
            c = load(folder / "model", device="cpu")
            labels = c.predict(few)
        except InputError as error:
            must(len(str(error)) < 5000, "the message is short")
            return kind, "refused"
        finally:
            no_code_ran()
        if c.certificate_.void:
            return kind, "void"
        must(np.array_equal(labels, expected), "other labels, and a certificate in force")
        return kind, "same labels"

    return attack


def damage(rng: np.random.Generator, folder: Path) -> None:
    file = sorted(folder.iterdir())[rng.integers(3)]
    content = bytearray(file.read_bytes())
    match rng.integers(6):
        case 0:
            content[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
        case 1:
            del content[rng.integers(len(content)) :]
        case 2:
            start = rng.integers(len(content))
            content[start : start + 64] = rng.bytes(64)
        case 3:
            content += rng.bytes(int(rng.integers(1, 1000)))
        case 4:
            content = bytearray(rng.bytes(int(rng.integers(1, 1000))))
        case _:
            file.unlink()
            return
    file.write_bytes(content)


def nasty(rng: np.random.Generator) -> Any:
    return copy.deepcopy(NASTY[rng.integers(len(NASTY))])


def places(tree: Any) -> list[tuple[Any, Any]]:
    """Every container and key of a tree of JSON."""
    pairs = list(tree.items()) if isinstance(tree, dict) else list(enumerate(tree)) if isinstance(tree, list) else []
    return [(tree, key) for key, _ in pairs] + [pair for _, value in pairs for pair in places(value)]


def described(folder: Path) -> dict[str, Any]:
    """The description without its checksums."""
    about = json.loads((folder / storage.ABOUT).read_text())
    del about["checksum"], about["sha256"]
    return about


def sealed(folder: Path, about: dict[str, Any]) -> None:
    """Write a description with checksums that are right."""
    about["sha256"] = {name: file_hash(folder / name) for name in (storage.WEIGHTS, storage.EXITS)}
    about["checksum"] = storage._checksum(about)
    (folder / storage.ABOUT).write_text(json.dumps(about))


def forge_description(rng: np.random.Generator, folder: Path) -> None:
    about = described(folder)
    for _ in range(rng.integers(1, 4)):
        everywhere = places(about)
        tree, key = everywhere[rng.integers(len(everywhere))]
        value = tree[key]
        match rng.integers(5):
            case 0 | 1:
                tree[key] = nasty(rng)
            case 2 if isinstance(value, (int, float)):
                tree[key] = value * [2, -1, 1e6, 0.5][rng.integers(4)]
            case 2 if isinstance(value, str) and value:
                tree[key] = value[: rng.integers(len(value))]
            case 2 if isinstance(value, list):
                tree[key] = value * 2 if rng.integers(2) else value[:-1]
            case 3:
                del tree[key]
            case _ if isinstance(tree, dict):
                tree[str(rng.integers(10))] = nasty(rng)
            case _:
                tree[key] = json.loads("[" * 40 + "]" * 40)
    sealed(folder, about)


def forge_tensors(rng: np.random.Generator, folder: Path) -> None:
    name = [storage.WEIGHTS, storage.EXITS, storage.EXITS][rng.integers(3)]
    tensors = load_file(folder / name)
    for _ in range(rng.integers(1, 4)):
        key = sorted(tensors)[rng.integers(len(tensors))]
        value = tensors[key]
        changes: list[Callable[[], Tensor]] = [
            lambda v=value: torch.full_like(v, torch.nan) if v.is_floating_point() else v.long() - 10**9,
            lambda v=value: torch.full_like(v, torch.inf) if v.is_floating_point() else v * 10**9,
            lambda v=value: torch.zeros_like(v),
            lambda v=value: v * 1e30 if v.is_floating_point() else v + 1,
            lambda v=value: v.to([torch.float16, torch.int8, torch.float64, torch.bool][rng.integers(4)]),
            lambda v=value: v.flatten(),
            lambda v=value: v[None],
            lambda v=value: torch.cat([v, v]) if v.dim() else v[None],
            lambda v=value: v[:0] if v.dim() else v,
            lambda v=value: v + 0.1 * torch.rand(v.shape) if v.is_floating_point() else v.long() - 1,
            lambda v=value: v.transpose(0, -1).contiguous() if v.dim() else v,
        ]
        choice = rng.integers(len(changes) + 2)
        if choice < len(changes):
            tensors[key] = changes[choice]()
        elif choice == len(changes):
            del tensors[key]
        else:
            tensors[f"more.{rng.integers(9)}"] = torch.ones(3)
    save_file({k: v.contiguous().clone() for k, v in tensors.items()}, folder / name)
    sealed(folder, described(folder))
