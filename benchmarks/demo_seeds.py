"""The demonstration with twenty seeds: agreement, cost, clustering accuracy, seconds.

    uv run python benchmarks/demo_seeds.py

Runs `ssl-exit demo` with seeds 0 to 19 (`--seeds`); all figures are on its test part (449 digits).
"""

import argparse
import contextlib
import io
import sys

from common import report

from ssl_exit.cli.demo import run_demo
from ssl_exit.report.tables import text_table

COLUMNS = ("agreement", "cost_macs", "cost_time", "acc", "acc_full", "seconds")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20)
    figures = []
    for seed in range(parser.parse_args().seeds):
        with contextlib.redirect_stdout(io.StringIO()):
            figures.append(run_demo(None, seed, epochs=60, progress=False))
        print(*(f"{column} {figures[-1][column]:.4g}" for column in ("seed", *COLUMNS)), file=sys.stderr, flush=True)
    rows = [(str(one["seed"]), *(f"{one[column]:.3f}" for column in COLUMNS)) for one in figures]
    print(text_table(("seed", *COLUMNS), rows))
    report("demo_seeds", figures)


if __name__ == "__main__":
    main()
