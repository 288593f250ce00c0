"""How much memory images may take."""

import os
from pathlib import Path

MEMORY_SHARE = 0.25  # of the machine's memory that images may take


def memory() -> int:
    """Bytes of memory this machine, or the container it is, has."""
    limit = Path("/sys/fs/cgroup/memory.max")
    allowed = limit.read_text().strip() if limit.is_file() else "max"
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return physical if allowed == "max" else min(physical, int(allowed))
