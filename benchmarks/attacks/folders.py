"""Damaged, huge and odd files, loops, pipes and names among images that can be read."""

import contextlib
import csv
import io
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from attacks.trial import Attack, digits, fitted, must
from ssl_exit.cli import main as command


def folders(place: Path) -> Attack:
    """Damaged, huge and odd files, loops, pipes and names among images that can be read."""
    images = digits()
    c = fitted(images[:1200])
    c.save(place / "model")
    pixels = (images[1200:1264, 0] * 255).to(torch.uint8).numpy()

    def picture(rng: np.random.Generator) -> tuple[bytes, str]:
        kind = ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM"][rng.integers(7)]
        content = io.BytesIO()
        Image.fromarray(pixels[rng.integers(64)]).save(content, kind)
        return content.getvalue(), kind

    def odd(rng: np.random.Generator, folder: Path, name: str) -> None:
        path = folder / name
        match rng.integers(12):
            case 0 | 1 | 2:
                content = bytearray(picture(rng)[0])
                for _ in range(rng.integers(1, 10)):
                    content[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
                path.write_bytes(content)
            case 3:
                path.write_bytes(picture(rng)[0][: rng.integers(60)])
            case 4:
                path.write_bytes(rng.bytes(int(rng.integers(2000))))
            case 5:
                path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n(x) run\n%%EOF\n")
            case 6:
                path.symlink_to([folder, path, folder / "nowhere", "/dev/zero"][rng.integers(4)])
            case 7:
                os.mkfifo(path)
            case 8:
                path.mkdir()
            case 9:
                wide, high = [(1_000_000, 1), (1, 300_000), (9_000, 9_000), (30_000, 30_000)][rng.integers(4)]
                Image.new("1", (wide, high)).save(path, "PNG")
            case 10:
                Image.fromarray(rng.integers(0, 65536, (40, 40)).astype(np.uint16)).save(path, "PNG")
            case _:
                frames = [Image.fromarray(p) for p in pixels[:3]]
                frames[0].save(path, "GIF", save_all=True, append_images=frames[1:])

    def attack(rng: np.random.Generator, folder: Path) -> tuple[str, str]:
        data, out = folder / "images", folder / "labels.csv"
        (data / "below").mkdir(parents=True)
        names = ["=1+1", "-x", "@x", "a,b", 'a"b', "a\nb", "\x1b[31m", "caf\udce9", "\u2028", "..", " ", "x" * 200]
        good = {}
        for i in range(rng.integers(3, 9)):
            which = int(rng.integers(64))
            name = f"{names[rng.integers(len(names))]}{i}.png"
            under = ["", "below/"][rng.integers(2)]
            Image.fromarray(pixels[which]).save(os.fsencode(data / under / name).decode(errors="surrogateescape"))
            good[under + name] = which
        for i in range(rng.integers(1, 7)):
            odd(rng, data / ["", "below"][rng.integers(2)], f"odd{i}.{['png', 'jpg', 'gif', 'TIF'][rng.integers(4)]}")
        before = sorted(os.walk(data))
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            command(["predict", "--model", str(place / "model"), "--data", str(data), "--out", str(out)])
        must(before == sorted(os.walk(data)), "the folder is as it was")
        with out.open(newline="", encoding="utf-8", errors="surrogateescape") as f:
            rows = {os.path.normpath(name): int(label) for name, label, *_ in [*csv.reader(f)][1:]}
        must(set(good) <= set(rows), "every image has its row")
        seen = [rows[name] for name in good]
        must(seen == expected[list(good.values())].tolist(), "every image has its label")
        return "folder", "labelled"

    expected = c.predict((images[1200:1264] * 255).to(torch.uint8))
    return attack
