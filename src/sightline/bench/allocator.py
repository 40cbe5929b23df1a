"""Measuring operators instead of the C library's memory management."""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of mallopt(3)


def keep_freed_memory() -> bool:
    """Let this process keep the memory that it frees, until it ends; False where the C library is not glibc.

    glibc takes blocks above 32 MiB from the system one by one and gives each back when it is freed. The next operation then
    faults in every page anew, which takes longer than what it computes and makes linear operators look worse than linear.
    Kept memory is written again instead. What tensors hold at one time does not change.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library, another system
        return False
    return bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, -1))
