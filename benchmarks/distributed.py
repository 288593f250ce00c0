"""Is the saving kept inside workers that label images call by call, and what do Ray and a second worker change?

    OMP_NUM_THREADS=1 uv run python benchmarks/distributed.py

SimCLR's ResNet-20, exits in the encoder at 10 % disagreement, one thread a process.

Calls: `LabelColumns` on 4,096 decoded test images of CIFAR-10, so many images a call and a batch of the engine.
Printed: the speed-up over the same calls with the full encoder, and that / the speed-up that segment times and shares
of images promise; ways run in turns.

Pipelines: JPEG files to labels, decoding included: `ExitClusterer.predict` in this process, and Ray Data with one and
two actors, each with early exits and with the full encoder. Printed: images a second while all actors work, from times
that the actors take at the start and the end of every call (at the consumer rows come in lumps); resident memory of an
actor; seconds from the command to the first call, which start-up takes.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import PREPROCESSING, cifar, cifar_folder, clusterer, encoder, report, spread

from ssl_exit import load
from ssl_exit.cascade.memory import kept_memory
from ssl_exit.data.image_files import FolderImages, SomeImages
from ssl_exit.measure.seconds import segment_seconds
from ssl_exit.model import Model
from ssl_exit.report.tables import text_table
from ssl_exit.scale import LabelColumns, label_dataset, ray_data
from ssl_exit.storage import save_model

KEYS = ("rate", "seconds", "processes", "memory", "start")
CALLS = [(256, 256), (1024, 256), (1024, 64), (1024, 32), (4096, 256)]  # images a call, images a batch


def full(model: Model) -> Model:
    """The same model, in which nothing leaves."""
    return replace(model, cascade=model.cascade.at(np.full_like(model.cascade.thresholds, np.inf)))


def predicted(model: Model, images: torch.Tensor, shares: np.ndarray, batch: int) -> float:
    """Speed-up by the times of segments on full batches and the share of images that reach each."""
    segments, whole = segment_seconds(model.plan, model.full_plan, images[:batch], batch, 9)
    return whole / float(segments @ shares[: len(segments)])


def calls(model: Model, repeats: int) -> list[dict[str, Any]]:
    pixels = cifar("test")[0][:4096].permute(0, 2, 3, 1).contiguous().numpy()
    prepared = PREPROCESSING["simclr"](cifar("test")[0][:256])
    exits = model.run(_batches(model, cifar("test")[0][:4096]), len(pixels)).exits
    shares = np.array([(exits >= s.stages.start).mean() for s in model.plan.segments])
    rows = []
    for size, batch in CALLS:
        parts = [list(pixels[i : i + size]) for i in range(0, len(pixels) - size + 1, size)]
        ways = {name: LabelColumns(one, batch_size=batch) for name, one in (("early", model), ("full", full(model)))}
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for repeat in range(repeats + 1):
            for name, label in ways.items():
                images = [label._images(part) for part in parts]  # decoded outside of what is timed
                ready = [[*one.batches(np.arange(size), batch)] for one in images]
                start = time.perf_counter()
                for some in ready:
                    label.model.run(some, size, batch)
                if repeat:
                    seconds[name].append(time.perf_counter() - start)
        realised = np.array(seconds["full"]) / np.array(seconds["early"])
        ratio = realised / predicted(model, prepared, shares, batch)
        rows.append({"a call": size, "a batch": batch, "speed-up": spread(realised.tolist()),
                     "realised / predicted": spread(ratio.tolist())})  # fmt: skip
    return rows


class Timed(LabelColumns):
    """Labels with the times of every call, its process and that process's memory."""

    def __call__(self, columns: Any) -> Any:
        began, rows = time.time(), super().__call__(columns)
        n, ended = len(rows["label"]), time.time()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        more = {"began": began, "ended": ended, "pid": os.getpid(), "rss": pages * os.sysconf("SC_PAGE_SIZE")}
        return rows | {name: np.full(n, value) for name, value in more.items()}


def by_ray(folder: Path, files: list[str], actors: int) -> dict[str, float]:
    """Images a second while all actors work, and what it takes to come there."""
    import ray

    start = time.time()
    dataset = ray.data.read_binary_files(files, include_paths=True, override_num_blocks=max(16, len(files) // 512))
    labelled = label_dataset(dataset, str(folder), "bytes", "path", actors=actors, device="cpu")
    calls: dict[tuple[int, float], list[float]] = {}
    for rows in labelled.iter_batches(batch_size=None, batch_format="numpy"):
        for pid, began, ended, rss in zip(rows["pid"], rows["began"], rows["ended"], rows["rss"], strict=True):
            one = calls.setdefault((int(pid), float(began)), [float(ended), 0, float(rss)])
            one[1] += 1
    pids = {pid for pid, _ in calls}
    own = {pid: sorted((began, *one) for (p, began), one in calls.items() if p == pid) for pid in pids}
    first, last = (max(one[0][1] for one in own.values()), min(one[-1][0] for one in own.values()))
    inside = sum(n * max(0.0, min(ended, last) - max(began, first)) / (ended - began)
                 for each in own.values() for began, ended, n, _ in each)  # fmt: skip
    memory, begun = max(rss for _, _, rss in calls.values()), min(began for _, began in calls)
    return {"rate": inside / (last - first), "seconds": last - first, "processes": len(pids), "memory": memory,
            "start": begun - start}  # fmt: skip


def here(folder: Path, images: SomeImages) -> dict[str, float]:
    """Images a second of `predict` in this process, once it has run."""
    c = load(folder, device="cpu")
    c.predict(SomeImages(images, range(1024)))
    start = time.perf_counter()
    c.predict(images)
    return {"rate": len(images) / (time.perf_counter() - start)}


def pipelines(model: Model, n: int, repeats: int) -> list[dict[str, Any]]:
    import ray

    source = FolderImages(cifar_folder() / "train", PREPROCESSING["simclr"])
    some = SomeImages(source, np.random.default_rng(0).permutation(len(source))[:n].tolist())
    files = [str(source.folder / path) for path in some.paths]
    models = Path(tempfile.mkdtemp())
    ways: dict[tuple[str, str], Any] = {}
    for name, one in (("early", model), ("full", full(model))):
        save_model(models / name, one)
        ways[name, "predict"] = lambda name=name: here(models / name, some)
        for actors in (1, 2):
            ways[name, f"Ray, {actors}"] = lambda name=name, actors=actors: by_ray(models / name, files, actors)
    ray_data.LabelColumns = Timed  # type: ignore[misc]
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    runs: dict[tuple[str, str], list[dict[str, float]]] = {way: [] for way in ways}
    try:
        for _ in range(repeats):
            for way, call in ways.items():
                runs[way].append(call())
                print(way, {key: round(value, 1) for key, value in runs[way][-1].items()}, flush=True)
    finally:
        ray.shutdown()
    return [
        {"images": name, "by": by} | {key: spread([run[key] for run in each]) for key in each[0]}
        for (name, by), each in runs.items()
    ]


def _batches(model: Model, images: torch.Tensor) -> Iterator[Any]:
    from ssl_exit.data.images import open_images

    return open_images(images, model.preprocessing).batches(np.arange(len(images)), 256)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--images", type=int, default=12_000, help="of every pipeline")
    args = parser.parse_args()
    options = {"n_clusters": 10, "max_disagreement": 0.1, "device": "cpu"}
    model = clusterer(encoder("simclr"), PREPROCESSING["simclr"], **options).fit(cifar("train")[0][::5]).model_
    with kept_memory():
        inside = calls(model, args.repeats)
    table = [(str(r["a call"]), str(r["a batch"]), *(f"{r[k]['median']:.2f}" for k in list(r)[2:])) for r in inside]
    print(text_table(list(inside[0]), table))
    rows = pipelines(model, args.images, args.repeats)
    shown = [(r["images"], r["by"], *(f"{r[k]['median']:,.0f}" if k in r else "-" for k in KEYS)) for r in rows]
    print(text_table(["", "by", *KEYS], shown))
    report("distributed", {"calls": inside, "pipelines": rows})


if __name__ == "__main__":
    main()
