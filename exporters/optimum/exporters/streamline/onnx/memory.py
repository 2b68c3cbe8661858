"""How much memory an export may take, and how much of it weights in ONNX Runtime do."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import psutil

IN_RUNTIME = 3
"""Bytes of memory for a byte of weights in a graph that is opened on a CPU, at most.

Half precision is computed as float there, twice the size, beside what was read; float is rearranged, beside what was
read. Measured: 2.2 for a graph in fp16, 1.5 in fp32.
"""

_GROUP = Path("/sys/fs/cgroup")  # which psutil does not look at


def free_memory() -> int:
    """Bytes that this process can still have: of the machine's memory, and of its container's (control groups, v2)."""
    free: int = psutil.virtual_memory().available
    with suppress(OSError, ValueError, KeyError):  # no container, or one without a limit, which says "max"
        limit = int((_GROUP / "memory.max").read_text())
        counts = dict(line.split() for line in (_GROUP / "memory.stat").read_text().splitlines())
        cached = int(
            counts["inactive_file"]
        )  # of files, the weights just written among them: given back when asked for
        free = min(free, limit - int((_GROUP / "memory.current").read_text()) + cached)
    return free


def taken_memory() -> int:
    """Bytes that this process has."""
    taken: int = psutil.Process().memory_info().rss
    return taken
