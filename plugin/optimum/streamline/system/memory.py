"""How much memory is free, how much this process takes, and how freed memory goes back to the system."""

from __future__ import annotations

import ctypes
import sys
from contextlib import suppress
from pathlib import Path

import psutil

_GROUP = Path("/sys/fs/cgroup")  # which psutil does not look at
# glibc's `M_MMAP_THRESHOLD`: blocks of at least so many bytes are mapped, and unmapped as soon as they are freed.
_MAP_THRESHOLD, _MAPPED_FROM = -3, 1 << 20


def free_memory() -> int:
    """The memory in bytes that this process can still take, on the machine and in its container (cgroup v2)."""
    free: int = psutil.virtual_memory().available
    with suppress(OSError, ValueError, KeyError):  # no container, or one without a limit: its file says "max"
        limit = int((_GROUP / "memory.max").read_text())
        counts = dict(line.split() for line in (_GROUP / "memory.stat").read_text().splitlines())
        # The page cache holds the weights just written, among other files; the kernel frees it on demand.
        page_cache = int(counts["inactive_file"])
        free = min(free, limit - int((_GROUP / "memory.current").read_text()) + page_cache)
    return free


def taken_memory() -> int:
    """The memory in bytes that this process takes (resident set size)."""
    taken: int = psutil.Process().memory_info().rss
    return taken


def give_back_freed_tensors() -> None:
    """Let every tensor of at least 1 MiB go back to the system when it is freed, from now on (Linux with glibc).

    Otherwise glibc keeps blocks of up to 32 MiB for later. A model whose layers are read one by one then takes nearly
    as much memory as the whole model.
    """
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL("libc.so.6").mallopt(_MAP_THRESHOLD, _MAPPED_FROM)
