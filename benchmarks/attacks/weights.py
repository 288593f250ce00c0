"""Weights files that run code, take memory, or hold other than the weights."""

import json
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from attacks.trial import MARKER, Attack, must, no_code_ran
from ssl_exit import EncoderSpec, InputError
from ssl_exit.encoders.small import digits_encoder
from ssl_exit.encoders.weights import read_state_dict


class Runs:
    """Runs code where a pickle is loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, (f"touch {MARKER}",))


def weights(place: Path) -> Attack:
    """Files that run code, take memory, or hold other than the weights."""
    good = digits_encoder().state_dict()
    first = next(iter(good))

    def pickled(rng: np.random.Generator, file: Path) -> None:
        content: Any = [Runs(), {first: Runs()}, {"state_dict": Runs()}, [good, Runs()]][rng.integers(4)]
        if rng.integers(2):
            file.write_bytes(pickle.dumps(content, protocol=int(rng.integers(2, 6))))
        else:
            torch.save(content, file, _use_new_zipfile_serialization=bool(rng.integers(2)))

    def bomb(rng: np.random.Generator, file: Path) -> None:
        torch.save(good, file)
        with zipfile.ZipFile(file) as archive:
            entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
        names = sorted(entries)
        entries[names[rng.integers(len(names))]] = bytes(int(rng.integers(1, 400)) << 20)
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED if rng.integers(4) else zipfile.ZIP_STORED) as archive:
            for name, content in entries.items():
                archive.writestr(name, content)

    def memo(rng: np.random.Generator, file: Path) -> None:
        depth = int(rng.integers(20, 60))  # a list of two of the same lists, and so on: 2^depth entries
        file.write_bytes(b"\x80\x02](e" + b"](hh" * depth + b"." if rng.integers(2) else b"(" * 10**6 + b"t.")

    def header(rng: np.random.Generator, file: Path) -> None:
        size = [2**63, 2**40, 10**8, 0, 7][rng.integers(5)]
        about: Any = {first: {"dtype": "F32", "shape": [int(10 ** rng.integers(1, 18))], "data_offsets": [0, 4]}}
        text = [json.dumps(about).encode(), b"[" * 100_000, b"{}", b'{"__metadata__": {"a": 1}}'][rng.integers(4)]
        length = size if rng.integers(2) else len(text)
        file.write_bytes(length.to_bytes(8, "little") + text + rng.bytes(64))

    def changed(rng: np.random.Generator, file: Path) -> None:
        state: dict[str, Any] = dict(good)
        key = sorted(state)[rng.integers(len(state))]
        types = (torch.int32, torch.int64, torch.bool, torch.float16, torch.float64, torch.complex64, torch.uint8)
        others = [torch.float8_e4m3fn, torch.bfloat16, torch.int8]
        match rng.integers(4):
            case 0:
                state[key] = state[key].to([*types, *others][rng.integers(10)])
            case 1:
                state[key] = state[key][None]
            case 2:
                del state[key]
            case _:
                state["head.weight"] = torch.zeros(2)
        metadata = [
            None,
            {"preprocessing": "nonsense"},
            {"preprocessing": json.dumps({"size": 10**9, "mean": [0.0], "std": [1.0]})},
            {"preprocessing": '{"size": 8, "mean": [NaN], "std": [1.0]}'},
            {"preprocessing": "[" * 100_000},
        ][rng.integers(5)]
        save_file(state, file, metadata)

    def bits(rng: np.random.Generator, file: Path) -> None:
        save_file(good, file) if file.suffix == ".safetensors" else torch.save(good, file)
        content = bytearray(file.read_bytes())
        for _ in range(rng.integers(1, 10)):
            content[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
        file.write_bytes(content[: None if rng.integers(2) else int(rng.integers(len(content)))])

    def attack(rng: np.random.Generator, folder: Path) -> tuple[str, str]:
        makers = {"pickle": pickled, "bomb": bomb, "memo": memo, "header": header, "changed": changed, "bits": bits}
        kind = list(makers)[rng.integers(len(makers))]
        suffix = ".safetensors" if kind in ("header", "changed") else [".pt", ".pth", ".ckpt"][rng.integers(3)]
        file = folder / f"weights{'.safetensors' if kind == 'bits' and rng.integers(2) else suffix}"
        makers[kind](rng, file)
        try:
            spec = EncoderSpec("digits_cnn", str(file))
            spec.preprocessing()
            read_state_dict(file)
            encoder = spec.build()
        except InputError:
            return kind, "refused"
        finally:
            no_code_ran()
        own = encoder.state_dict()
        must(
            all(own[k].dtype == v.dtype and own[k].shape == v.shape for k, v in good.items()), "types are the encoder's"
        )
        return kind, "read"

    return attack
