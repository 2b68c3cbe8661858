"""How much memory is free for an export, and how much the weights of an opened graph take."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import psutil

IN_RUNTIME = 3
"""An upper bound of the bytes of memory that ONNX Runtime takes per byte of weights, on a CPU.

It keeps the weights as read. Beside them it keeps fp16 weights converted to float32, and float32 weights repacked for
its kernels. Measured: 2.2 for a graph in fp16, 1.5 in fp32.
"""

_GROUP = Path("/sys/fs/cgroup")  # which psutil does not look at


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
