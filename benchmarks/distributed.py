"""Is the saving kept inside a worker that labels images call by call?

    OMP_NUM_THREADS=1 uv run python benchmarks/distributed.py

SimCLR's ResNet-20, exits in the encoder at 10 % disagreement, 4,096 of CIFAR-10's test images, one thread:
`LabelColumns` on decoded pixels, so many images a call and a batch of the engine. Printed: the speed-up over the same
calls with the full encoder, and that / the speed-up that segment times and shares of images promise; ways run in turns.
"""

import argparse
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from common import PREPROCESSING, cifar, clusterer, encoder, report, spread

from ssl_exit.cascade.memory import kept_memory
from ssl_exit.measure.seconds import segment_seconds
from ssl_exit.model import Model
from ssl_exit.report.tables import text_table
from ssl_exit.scale import LabelColumns

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


def _batches(model: Model, images: torch.Tensor) -> Iterator[Any]:
    from ssl_exit.data.images import open_images

    return open_images(images, model.preprocessing).batches(np.arange(len(images)), 256)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    options = {"n_clusters": 10, "max_disagreement": 0.1, "device": "cpu"}
    model = clusterer(encoder("simclr"), PREPROCESSING["simclr"], **options).fit(cifar("train")[0][::5]).model_
    with kept_memory():
        inside = calls(model, args.repeats)
    table = [(str(r["a call"]), str(r["a batch"]), *(f"{r[k]['median']:.2f}" for k in list(r)[2:])) for r in inside]
    print(text_table(list(inside[0]), table))
    report("distributed", {"calls": inside})


if __name__ == "__main__":
    main()
