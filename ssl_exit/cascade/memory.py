"""glibc's malloc told to keep freed memory: an explicit choice of whoever owns the process."""

import ctypes
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # of glibc's malloc.h
LARGEST = 32 << 20  # bytes; where glibc's own threshold for mmap stops growing
_lock, _active = threading.Lock(), 0  # number of active contexts (nested or concurrent)


@contextmanager
def kept_memory() -> Iterator[None]:
    """Within this context, freed memory stays with the process, so that the next allocation costs no page faults.

    glibc returns large tensors to the system at once, and allocating them again costs page faults in every step of a
    training and every stage of an encoder. On leaving, free memory is returned, and glibc's thresholds are set to the
    values they would reach by themselves (MALLOC_ variables are overridden). The setting is the process's: commands of
    `ssl-exit` use it, the Python interface does not by itself. Without glibc nothing changes.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if libc is None or not hasattr(libc, "mallopt") or not hasattr(libc, "malloc_trim"):
        yield
        return
    global _active
    with _lock:
        _active += 1
        if _active == 1:
            libc.mallopt(M_MMAP_MAX, 0)
            libc.mallopt(M_TRIM_THRESHOLD, -1)  # never
    try:
        yield
    finally:
        with _lock:
            _active -= 1
            if _active == 0:
                libc.mallopt(M_MMAP_MAX, 65536)
                libc.mallopt(M_MMAP_THRESHOLD, LARGEST)
                libc.mallopt(M_TRIM_THRESHOLD, 2 * LARGEST)
                libc.malloc_trim(0)
