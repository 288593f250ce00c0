"""A million images on one machine: does the time of an image stay level, does memory, and what does a kill cost?

    uv run python benchmarks/scale.py

Images are made on the fly from CIFAR-10's training images: shifted by up to four pixels, mirrored, brightened, each by
its own seed, so that every number of images means different ones. A frozen SimCLR ResNet-20 is fitted once (K = 10,
disagreement 5 %); then, in a process of its own for every size, `ExitClusterer.stream` clusters them and `LabelFile`
writes a row for each as it comes. What is printed: microseconds an image, median of the parts that `stream` gives, the
spread of those parts, and peak resident memory.

The run of the largest size is killed (SIGKILL) half-way and started again; its rows are compared with the names of all
images, one by one, and the 16,384 around the place with labels computed anew, without a stop.
"""

import argparse
import csv
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from common import PREPROCESSING, ROOT, cifar, clusterer, encoder, report
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ssl_exit import ExitClusterer, load
from ssl_exit.report.label_file import LabelFile
from ssl_exit.report.tables import text_table

HOW = PREPROCESSING["simclr"]
FOLDER = ROOT / "runs" / "scale"


class Made(Dataset):
    """(3, 32, 32) float32: image i is made from CIFAR-10's image i mod 50,000."""

    def __init__(self, n: int) -> None:
        self.n, self.pixels = n, cifar("train")[0]

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> int:
        return i

    def collate(self, rows: list[int]) -> Tensor:
        """A batch at once: what is drawn for an image depends on its position alone."""
        i = torch.tensor(rows)
        drawn = (i * 2654435761 + 12345) & 0xFFFFFFFF
        dy, dx = (drawn >> 4) % 9, (drawn >> 12) % 9
        light = ((drawn >> 20) % 256) / 1275 + 0.9  # 0.9 to 1.1
        padded = torch.nn.functional.pad(self.pixels[i % len(self.pixels)], (4, 4, 4, 4))
        y, x = dy[:, None] + torch.arange(32), dx[:, None] + torch.arange(32)
        made = padded[torch.arange(len(i))[:, None, None], :, y[:, :, None], x[:, None, :]].permute(0, 3, 1, 2)
        made = torch.where(((drawn >> 28) % 2 == 0)[:, None, None, None], made, made.flip(3))
        return HOW((made * light[:, None, None, None]).clamp(0, 255).byte())


class Names(Sequence):
    """What the images are called."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i):
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(self.n))]
        if i >= self.n:
            raise IndexError(i)
        return f"image-{i:07d}"


def opened(n: int) -> tuple[ExitClusterer, DataLoader]:
    warnings.simplefilter("ignore")
    c = load(FOLDER / "model", device="cpu")
    c.set_params(runtime__progress=False)
    data = Made(n)
    return c, DataLoader(data, batch_size=c.batch_size, collate_fn=data.collate)


def cluster(n: int, file: Path) -> None:
    """Cluster n images in this process; figures as JSON on stdout."""
    c, loader = opened(n)
    parts = []
    with LabelFile(file, Names(n), c.exit_names_, "scale") as labels:
        begun = labels.n_rows
        start = time.perf_counter()
        for result in c.stream(loader, begun):
            labels.add(result)
            parts.append(((time.perf_counter() - start) / len(result.labels), len(result.labels)))
            start = time.perf_counter()
    whole = [seconds for seconds, size in parts if size == max(size for _, size in parts)]
    spread = np.quantile(whole, [0.5, 0.1, 0.9]) * 1e6
    mean = sum(seconds * size for seconds, size in parts) / sum(size for _, size in parts) * 1e6
    status = Path("/proc/self/status").read_text()  # ru_maxrss would begin at what the parent process holds
    peak = int(status.split("VmHWM:")[1].split()[0]) / 1024
    keys = ("microseconds an image", "tenth", "nine tenths")
    print(json.dumps(dict(zip(keys, spread, strict=True)) | {"mean": mean, "peak MB": peak, "begun": begun}))


def in_process(n: int, file: Path) -> dict:
    done = subprocess.run([sys.executable, __file__, "--one", str(n), str(file)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout)


def killed(n: int, file: Path) -> int:
    """Begin, kill when half the rows are written, and say how many there were."""
    file.unlink(missing_ok=True)
    process = subprocess.Popen([sys.executable, __file__, "--one", str(n), str(file)])
    bytes_a_row = 43
    while not any(part.stat().st_size > n // 2 * bytes_a_row for part in file.parent.glob(f".{file.name}-*.part")):
        time.sleep(0.2)
        if process.poll() is not None:
            raise SystemExit("the run ended before it was killed")
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    (part,) = file.parent.glob(f".{file.name}-*.part")
    return sum(1 for _ in part.open()) - 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", type=int, default=[10_000, 100_000, 1_000_000])
    args = parser.parse_args()
    c = clusterer(encoder("simclr"), HOW, max_disagreement=0.05, precision="bfloat16", cost="time")
    c.fit(cifar("train")[0])
    c.save(FOLDER / "model")
    for left in FOLDER.glob(".labels-*.part"):  # of another model
        left.unlink()
    rows = {}
    for n in args.sizes:
        file = FOLDER / f"labels-{n}.csv"
        largest = n == max(args.sizes) and len(args.sizes) > 1
        before = killed(n, file) if largest else 0
        rows[n] = in_process(n, file)
        if largest:
            rows[n]["rows when killed"] = before
        print(n, rows[n], flush=True)
    most = max(args.sizes)
    with (FOLDER / f"labels-{most}.csv").open() as f:
        found = list(csv.reader(f))[1:]
    each_once = [row[0] for row in found] == list(Names(most))
    c, loader = opened(most)
    begin = max(0, rows[most].get("rows when killed", 0) - 8192)
    again = next(c.stream(loader, begin)).labels
    same = np.mean(again == [int(row[1]) for row in found[begin : begin + len(again)]])
    figures = {"sizes": rows, "every row once and in order": each_once, "labels as without a stop": float(same)}
    report("scale", figures)
    keys = ("microseconds an image", "tenth", "nine tenths", "mean", "peak MB")
    print(text_table(("images", *keys), [(f"{n:,}", *(f"{row[k]:.1f}" for k in keys)) for n, row in rows.items()]))
    print(f"every row once and in order: {each_once}; labels as without a stop: {same:.4f}")


if __name__ == "__main__":
    if "--one" in sys.argv:
        cluster(int(sys.argv[-2]), Path(sys.argv[-1]))
    else:
        main()
