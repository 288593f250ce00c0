"""Is the saving kept inside workers, and what do Ray's workers cost beside one process?

    OMP_NUM_THREADS=1 uv run python benchmarks/distributed.py

SimCLR's ResNet-20, exits in the encoder at 10 % disagreement, CIFAR-10's test images; one thread a process.

    calls      `LabelColumns` on decoded pixels, so many images a call and a batch of the engine: realised speed-up over
               the same calls with the full encoder / the speed-up that segment times predict
    ray        images a second of Ray's actors on JPEG files in Parquet (every test image `--copies` times), decoding
               included, once a third of the rows have come; beside `predict` on the same files in this process, and
               with the full encoder in both
    start-up   seconds from the call to the first rows

Ways run in turns, `--repeats` times.
"""

import argparse
import io
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch
from common import PREPROCESSING, cifar, clusterer, encoder, report, spread
from PIL import Image
from pyarrow import parquet

from ssl_exit.cascade.memory import kept_memory
from ssl_exit.measure.seconds import segment_seconds
from ssl_exit.model import Model
from ssl_exit.report.tables import text_table
from ssl_exit.scale import LabelColumns, label_dataset
from ssl_exit.storage import save_model

CALLS = [(256, 256), (1024, 256), (1024, 64), (1024, 32), (4096, 256)]  # images a call, images a batch
ROWS = 512  # of a row group: what Ray reads and hands on


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


def _batches(model: Model, images: torch.Tensor) -> Iterator[Any]:
    from ssl_exit.data.images import open_images

    return open_images(images, model.preprocessing).batches(np.arange(len(images)), 256)


def jpegs(copies: int, folder: str) -> tuple[str, list[bytes]]:
    """A Parquet file of encoded images."""
    cells = []
    for image in cifar("test")[0].permute(0, 2, 3, 1).numpy():
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=90)
        cells.append(file.getvalue())
    cells *= copies
    path = f"{folder}/images.parquet"
    parquet.write_table(pa.table({"id": range(len(cells)), "image": cells}), path, row_group_size=ROWS)
    return path, cells


def steady(batches: Iterator[int], n: int) -> tuple[float, float]:
    """Images a second once a third have come, and seconds until the first came."""
    start, came, first, third = time.perf_counter(), 0, 0.0, (0.0, 0)
    for count in batches:
        now, came = time.perf_counter(), came + count
        first = first or now - start
        if came >= n / 3 and not third[1]:
            third = now, came
    return (came - third[1]) / (time.perf_counter() - third[0]), first


def by_ray(model: str, path: str, actors: int) -> Iterator[int]:
    dataset = ray.data.read_parquet(path, override_num_blocks=20)
    labels = label_dataset(dataset, model, id_column="id", actors=actors, device="cpu")
    for batch in labels.iter_batches(batch_size=None, batch_format="numpy"):
        yield len(batch["id"])


def here(model: Model, cells: list[bytes]) -> Iterator[int]:
    label = LabelColumns(model, batch_size=256)
    for i in range(0, len(cells), 16384):  # as `predict` streams: 64 batches a part
        yield len(label({"image": cells[i : i + 16384]})["label"])


def ray_speeds(model: Model, copies: int, repeats: int) -> dict[str, Any]:
    """Images a second and start-up of every way, by its name."""
    with TemporaryDirectory() as folder:
        path, cells = jpegs(copies, folder)
        save_model(Path(folder) / "model", model)
        save_model(Path(folder) / "full", full(model))
        ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False)
        ray.data.DataContext.get_current().enable_progress_bars = False
        ways: dict[str, Callable[[], Iterator[int]]] = {}
        for name, one, saved in (("early exit", model, "model"), ("full encoder", full(model), "full")):
            ways[f"predict, {name}"] = lambda one=one: here(one, cells)
            for actors in (1, 2):
                where = f"{folder}/{saved}"
                ways[f"ray, {actors} actors, {name}"] = lambda where=where, actors=actors: by_ray(where, path, actors)
        speeds: dict[str, list[float]] = {way: [] for way in ways}
        starts: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(repeats):
            for way, batches in ways.items():
                speed, first = steady(batches(), len(cells))
                speeds[way].append(speed)
                starts[way].append(first)
        ray.shutdown()
    rows = [(way, f"{np.median(speeds[way]):,.0f}", f"{np.median(starts[way]):.1f}") for way in ways]
    print(text_table(["", "images a second", "first rows, s"], rows))
    return {way: {"images a second": spread(speeds[way]), "start-up": spread(starts[way])} for way in ways}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--copies", type=int, default=4)
    parser.add_argument("--skip-ray", action="store_true", help="the calls alone")
    args = parser.parse_args()
    options = {"n_clusters": 10, "max_disagreement": 0.1, "device": "cpu"}
    model = clusterer(encoder("simclr"), PREPROCESSING["simclr"], **options).fit(cifar("train")[0][::5]).model_
    with kept_memory():
        inside = calls(model, args.repeats)
    table = [(str(r["a call"]), str(r["a batch"]), *(f"{r[k]['median']:.2f}" for k in list(r)[2:])) for r in inside]
    print(text_table(list(inside[0]), table))
    figures = {} if args.skip_ray else ray_speeds(model, args.copies, args.repeats)
    report("distributed", {"calls": inside, "ray": figures})


if __name__ == "__main__":
    main()
