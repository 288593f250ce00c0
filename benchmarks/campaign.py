"""Attack the library at random and count how it answers.

    uv run python benchmarks/campaign.py                 # all attacks, about an hour on 2 cores
    uv run python benchmarks/campaign.py models --n 500  # one, and fewer of it

The attacks stand in `attacks.py`. Every trial has a seed of its own and runs in a process that is forked, may take 60
seconds and 6 GB more than it began with, and ends in one line of data/campaign/NAME.jsonl: what came of it. A trial
that breaks a promise of docs/trust.md, or ends in anything but an answer or one clear error, counts as FAILED. Started
again, the campaign does the trials that are missing; `--again FAILED` repeats the failed ones.
"""

import argparse
import json
import os
import resource
import select
import shutil
import signal
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from attacks import ATTACKS
from common import ROOT, report

from ssl_exit.report.tables import text_table

LOGS = ROOT / "data" / "campaign"
SECONDS, MEMORY = 60, 6 << 30
TRIALS = 200  # of a process
FAILED = "FAILED"


def outcomes(name: str) -> dict[int, dict]:
    """Of all trials so far, by seed."""
    file = LOGS / f"{name}.jsonl"
    lines = file.read_text().splitlines() if file.is_file() else []
    return {one["seed"]: one for one in map(json.loads, lines)}


def write(name: str, outcome: dict) -> None:
    with (LOGS / f"{name}.jsonl").open("a") as f:
        f.write(json.dumps(outcome) + "\n")


def trial(attack: Callable, seed: int, place: Path) -> dict:
    """One trial, in this process."""
    folder = place / f"trial-{seed}"
    folder.mkdir()
    began = time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            kind, came = attack(np.random.default_rng(seed), folder)
        outcome = {"seed": seed, "kind": kind, "outcome": came}
    except BaseException as error:
        last = traceback.format_exc().splitlines()[-12:]
        outcome = {"seed": seed, "kind": "", "outcome": FAILED, "error": repr(error)[:300], "trace": last}
    shutil.rmtree(folder, ignore_errors=True)
    return outcome | {"seconds": round(time.perf_counter() - began, 3)}


def some_trials(name: str, attack: Callable, seeds: list[int], place: Path) -> int:
    """Run trials in a forked process until all are done or it dies; how many are."""
    reads, writes = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reads)
        silent = os.open(os.devnull, os.O_WRONLY)
        for stream in (1, 2):
            os.dup2(silent, stream)
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (size, size))
        for seed in seeds:
            outcome = trial(attack, seed, place)
            write(name, outcome)
            os.write(writes, b".")
        os._exit(0)
    os.close(writes)
    done = 0
    while True:
        ready, _, _ = select.select([reads], [], [], SECONDS)
        if not ready:
            os.kill(child, signal.SIGKILL)
        came = os.read(reads, 1) if ready else b""
        if not came:
            break
        done += 1
    os.close(reads)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if done < len(seeds):
        reason = f"no end after {SECONDS} s" if not ready else f"process died, status {status}"
        write(name, {"seed": seeds[done], "kind": "", "outcome": FAILED, "error": reason, "seconds": 0})
        done += 1
    return done


def campaign(name: str, n: int, again: str | None) -> None:
    """Do the trials of one attack that are missing."""
    LOGS.mkdir(parents=True, exist_ok=True)
    known = {seed for seed, one in outcomes(name).items() if one["outcome"] != again}
    seeds = [seed for seed in range(n) if seed not in known]
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as place:
        prepare, _ = ATTACKS[name]
        attack = prepare(Path(place))
        while seeds:
            done = some_trials(name, attack, seeds[:TRIALS], Path(place))
            seeds = seeds[done:]
            print(f"{name}: {n - len(seeds)} of {n}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("attacks", nargs="*", choices=[*ATTACKS, []], help="all if none is named")
    parser.add_argument("--n", type=int, help="trials of each; those of docs/trust.md if not set")
    parser.add_argument("--again", metavar="OUTCOME", help="repeat trials that came to this")
    args = parser.parse_args()
    torch.set_num_threads(1)  # and processes can be forked
    figures, rows = {}, []
    for name in args.attacks or ATTACKS:
        n = args.n or ATTACKS[name][1]
        campaign(name, n, args.again)
        each = [one for seed, one in outcomes(name).items() if seed < n]
        counts = Counter(one["outcome"] for one in each)
        figures[name] = {"n": len(each), "outcomes": dict(counts), "kinds": dict(Counter(one["kind"] for one in each))}
        rows += [(name, str(len(each)), outcome, str(count)) for outcome, count in sorted(counts.items())]
        for one in [one for one in each if one["outcome"] == FAILED][:5]:
            print(f"{name}, seed {one['seed']}: {one['error']}")
            print("\n".join(one.get("trace", [])))
    print("\n" + text_table(("attack", "trials", "outcome", "count"), rows))
    if not args.attacks:
        report("campaign", figures)


if __name__ == "__main__":
    main()
