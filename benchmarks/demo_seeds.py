"""The demonstration with five seeds: agreement, cost, clustering accuracy, seconds.

    uv run python benchmarks/demo_seeds.py

Runs `ssl-exit demo` with seeds 0 to 4; all figures are on its test part (449 digits).
"""

import contextlib
import io

from common import report

from ssl_exit.cli.demo import run_demo
from ssl_exit.report.tables import text_table

COLUMNS = ("agreement", "cost_macs", "cost_time", "acc", "acc_full", "seconds")


def main() -> None:
    figures = []
    for seed in range(5):
        with contextlib.redirect_stdout(io.StringIO()):
            figures.append(run_demo(None, seed, epochs=60, progress=False))
    rows = [(str(one["seed"]), *(f"{one[column]:.3f}" for column in COLUMNS)) for one in figures]
    print(text_table(("seed", *COLUMNS), rows))
    report("demo_seeds", figures)


if __name__ == "__main__":
    main()
