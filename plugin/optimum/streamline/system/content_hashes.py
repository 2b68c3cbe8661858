"""SHA-256 hashes of files. A file that has not changed is read only once in a process.

The standard library's hashlib computes them; no installed library remembers the hash of an unchanged file.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterable
from pathlib import Path

from optimum.streamline.errors import StreamlineError

# File systems update a file's times in steps of up to this long. Two writes within one step can leave the same times.
_CLOCK_STEP_NS = 2 * 10**9
_State = tuple[int, int, int, int, int]
_cached: dict[_State, str] = {}


def content_hash(file: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal.

    The hash is cached for this process under the file's device, inode, size, modification time and inode change time. A
    program can reset the modification time but not the inode change time. The hash is cached only if both times were
    older than `_CLOCK_STEP_NS` when reading began, so that any later write changes at least one of them.

    Raises:
        StreamlineError: the file cannot be read.
    """
    try:
        with file.open("rb") as stream:
            state, begun = _state(stream.fileno()), time.time_ns()
            if state in _cached:
                return _cached[state]
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
            if max(state[-2:]) + _CLOCK_STEP_NS < begun and _state(stream.fileno()) == state:
                _cached[state] = digest
    except OSError as error:
        raise StreamlineError(f"{file}: cannot be read ({error.strerror})") from None
    return digest


def folder_hashes(folder: Path, files: Iterable[str]) -> dict[str, str]:
    """The `content_hash` of each file in a folder, sorted by file name. Files that do not exist are left out.

    Args:
        folder: The folder.
        files: File names relative to `folder`.

    Returns:
        The hash of each existing file, by name.

    Raises:
        StreamlineError: a file cannot be read.
    """
    return {name: content_hash(folder / name) for name in sorted(files) if (folder / name).is_file()}


def _state(descriptor: int) -> _State:
    """The cache key of an open file: device, inode, size, modification time and inode change time."""
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
