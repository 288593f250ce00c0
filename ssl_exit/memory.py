"""Freed memory that stays at hand."""

import ctypes
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # of glibc's malloc.h
LARGEST = 32 << 20  # bytes; where glibc's own threshold for mmap stops growing
_lock, _open = threading.Lock(), 0  # how many are at it, one inside another or in several threads


@contextmanager
def kept_memory() -> Iterator[None]:
    """Within, memory that is freed stays with the process, so that the next step need not ask for it again.

    glibc hands large tensors back to the system at once, and getting them anew costs page faults in every training
    step. Afterwards all that is free is handed back, and glibc's thresholds are those it would come to by itself
    (MALLOC_ variables are overruled). Without glibc nothing changes.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if libc is None or not hasattr(libc, "mallopt") or not hasattr(libc, "malloc_trim"):
        yield
        return
    global _open
    with _lock:
        _open += 1
        if _open == 1:
            libc.mallopt(M_MMAP_MAX, 0)
            libc.mallopt(M_TRIM_THRESHOLD, -1)  # never
    try:
        yield
    finally:
        with _lock:
            _open -= 1
            if _open == 0:
                libc.mallopt(M_MMAP_MAX, 65536)
                libc.mallopt(M_MMAP_THRESHOLD, LARGEST)
                libc.mallopt(M_TRIM_THRESHOLD, 2 * LARGEST)
                libc.malloc_trim(0)
