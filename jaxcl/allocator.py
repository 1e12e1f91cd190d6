"""Keeps freed host memory in the process: on a CPU backend, fresh pages cost as much as a quarter of a train step."""

from __future__ import annotations

import ctypes
import sys

# Parameters of glibc's mallopt(3).
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8


def keep_pages() -> bool:
    """Tells the C library to reuse freed memory instead of giving it back; returns whether it did.

    XLA's CPU client allocates the temporary buffers of a step anew each time. Above 32 MiB glibc maps and unmaps
    them, and the kernel zeroes every page again. One arena without mappings and trimming keeps them. The process
    then holds its peak memory until it ends. Call it before the first large allocation. Nothing happens outside
    Linux with glibc.
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    wanted = ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, 2**31 - 1), (_TOP_PAD, 256 << 20))
    done = [mallopt(parameter, value) for parameter, value in wanted]
    return all(done)


def give_back() -> None:
    """Gives pages that hold nothing back to the system; later allocations take new ones.

    After a checkpoint: its buffers come between those of the steps, and with one arena that is never trimmed the
    process would hold more with every save (measured: four times the state after six). Takes about 0.1 s per GB that
    is held. Nothing happens outside Linux with glibc.
    """
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)
