"""Freed memory: kept within, handed back afterwards; in a process of its own, whose heap holds nothing else."""

import subprocess
import sys

import pytest

PROGRAM = """
import torch
from pathlib import Path
from ssl_exit.cascade.memory import kept_memory

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4 // 1024

def use():  # 480 MB in tensors that glibc gets from the system each on its own
    tensors = [torch.ones(48 << 18) for _ in range(10)]

use()
seen = [resident()]
try:
    with kept_memory():
        use()
        seen.append(resident())
        raise KeyError
except KeyError:
    seen.append(resident())
print(*seen)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_memory_stays_within_and_goes_afterwards():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    before, within, after = map(int, done.stdout.split())
    assert within > before + 400
    assert after < before + 100
