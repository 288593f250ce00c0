"""Does memory that glibc keeps make the engine faster? The same model with and without `kept_memory`.

    uv run python benchmarks/kept_memory.py

A frozen SimCLR ResNet-20 and CIFAR-10's test images, batches of 256, early exit and full encoder, each run within and
without the context, in turns; median seconds, spread, and the ratio without / within. `ssl-exit` runs its commands
within it; the Python interface leaves the process's malloc settings alone, and a program may open the context itself.
"""

import argparse
import time
from contextlib import nullcontext

import numpy as np
from common import PREPROCESSING, cifar, clusterer, encoder, report, spread

from ssl_exit.cascade.memory import kept_memory
from ssl_exit.data.images import open_images
from ssl_exit.report.tables import text_table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--images", type=int, default=5000)
    args = parser.parse_args()
    how = PREPROCESSING["simclr"]
    model = clusterer(encoder("simclr"), how, max_disagreement=0.05).fit(cifar("train")[0][::5]).model_
    images = cifar("test")[0][: args.images]
    batches = list(open_images(images, how).batches(np.arange(len(images)), 256))
    ways = {"early exit": model.run, "full encoder": model.run_full}
    seconds: dict[tuple[str, bool], list[float]] = {(way, kept): [] for way in ways for kept in (True, False)}
    for repeat in range(args.repeats + 1):
        for way, kept in list(seconds)[:: 1 if repeat % 2 else -1]:
            with kept_memory() if kept else nullcontext():
                start = time.perf_counter()
                ways[way](batches, len(images), 256)
                if repeat:
                    seconds[way, kept].append(time.perf_counter() - start)
    rows, figures = [], {}
    for way in ways:
        ratio = spread([a / b for a, b in zip(seconds[way, False], seconds[way, True], strict=True)])
        figures[way] = {"within": spread(seconds[way, True]), "without": spread(seconds[way, False]), "ratio": ratio}
        rows.append((way, *(f"{s['median']:.2f} ({s['least']:.2f}-{s['most']:.2f})" for s in figures[way].values())))
    print(text_table(("", "seconds within", "seconds without", "without / within"), rows))
    report("kept_memory", {"settings": vars(args), "rows": figures})


if __name__ == "__main__":
    main()
