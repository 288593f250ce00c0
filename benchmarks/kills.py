"""Is every image labelled exactly once by Ray, whatever is killed?

    OMP_NUM_THREADS=1 uv run python benchmarks/kills.py

CIFAR-10's 10,000 test images as JPEG files, SimCLR's ResNet-20 with exits, two actors on three CPUs, 128 images a
call, `ssl-exit predict --engine ray --checkpoint`. While it runs, at random moments, SIGKILL goes to an actor that
labels, to a process that reads or writes, or to the driver, which is then started again with the same command. Jobs are
begun anew until there were enough kills. Printed: kills, jobs, seconds, and of the rows written how many are missing,
come twice or have another label than `predict` gives in one process.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import ray
from common import PREPROCESSING, cifar, cifar_folder, clusterer, encoder, report
from pyarrow import parquet

from ssl_exit.data.image_files import FolderImages
from ssl_exit.report.tables import text_table

NAMES = {
    "actor": ("ray::MapWorker(MapBatches(_Actor))",),
    "worker": ("ray::Read", "ray::Write", "ray::IDLE", "ray::Map"),
}
COMMAND = [sys.executable, "-m", "ssl_exit", "predict", "--engine", "ray", "--actors", "2", "--device", "cpu"]


def victims(what: str) -> list[int]:
    """Processes of Ray of one kind, by the names that Ray gives them."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            name = entry.read_text()
        except OSError:  # it has ended
            continue
        if name.startswith(NAMES[what]) and name.startswith(NAMES["actor"]) == (what == "actor"):
            found.append(int(entry.parent.name))
    return found


def job(data: Path, model: Path, out: Path, checkpoint: Path) -> subprocess.Popen[bytes]:
    words = [*COMMAND, "--model", str(model), "--data", str(data), "--out", str(out), "--checkpoint", str(checkpoint)]
    return subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def killed(what: str, data: Path, model: Path, expected: dict[str, int], kills: int, rng: Any) -> dict[str, Any]:
    """One row of the table."""
    start, done, jobs = time.perf_counter(), 0, 0
    wrong: Counter[str] = Counter()
    while done < kills:
        jobs += 1
        folder = Path(tempfile.mkdtemp())
        process = job(data, model, folder / "out", folder / "done")
        while True:
            try:
                code = process.wait(float(rng.uniform(2, 25) if what == "driver" else rng.uniform(1, 6)))
            except subprocess.TimeoutExpired:
                code = None
            if code == 0:
                break
            if code is not None:
                wrong["commands that failed"] += 1
                process = job(data, model, folder / "out", folder / "done")
                continue
            if done >= kills:
                continue
            if what == "driver":
                process.kill()
                process.wait()
                process = job(data, model, folder / "out", folder / "done")
                done += 1
            elif some := victims(what):
                os.kill(some[int(rng.integers(len(some)))], signal.SIGKILL)
                done += 1
        rows = Counter[str]()
        for row in parquet.read_table(folder / "out", columns=["path", "label"]).to_pylist():
            path = row["path"]
            rows[path] += 1
            wrong["other labels"] += row["label"] != expected[path]
        wrong["missing"] += len(expected.keys() - rows.keys())
        wrong["twice"] += sum(n - 1 for n in rows.values())
        shutil.rmtree(folder)
        print(what, jobs, done, dict(wrong), f"{time.perf_counter() - start:.0f} s", flush=True)
    names = ("missing", "twice", "other labels", "commands that failed")
    return {"kills": done, "jobs": jobs, "rows": jobs * len(expected), **{name: wrong[name] for name in names},
            "seconds": time.perf_counter() - start}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    args = parser.parse_args()
    data, model = cifar_folder() / "test", Path(tempfile.mkdtemp()) / "model"
    c = clusterer(encoder("simclr"), PREPROCESSING["simclr"], n_clusters=10, max_disagreement=0.1, device="cpu")
    c.fit(cifar("train")[0][::5]).save(model)
    source = FolderImages(data, PREPROCESSING["simclr"])
    labels = c.predict(source)
    expected = {str(data / path): int(label) for path, label in zip(source.paths, labels, strict=True)}
    context = ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False)
    os.environ["RAY_ADDRESS"] = context.address_info["gcs_address"]
    rng, rows = np.random.default_rng(0), {}
    try:
        for what in ("actor", "worker", "driver"):
            rows[what] = killed(what, data, model, expected, args.kills, rng)
    finally:
        ray.shutdown()
    head = ["killed", *next(iter(rows.values()))]
    print(text_table(head, [(what, *(f"{value:.0f}" for value in row.values())) for what, row in rows.items()]))
    report("kills", rows)


if __name__ == "__main__":
    main()
