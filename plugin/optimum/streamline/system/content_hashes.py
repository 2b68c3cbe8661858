"""SHA-256 of files, each read once as long as it stays what it was. Knows nothing of what is in them.

hashlib reads them; nothing that is installed remembers a hash by a file's state, and huggingface_hub reads anew.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterable
from pathlib import Path

from optimum.streamline.errors import StreamlineError

# A write soon after another may leave a file's times as they were: clocks of file systems tick in steps of up to this.
_CLOCK_STEP_NS = 2 * 10**9
_State = tuple[int, int, int, int, int]
_known: dict[_State, str] = {}


def content_hash(file: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal; read as a stream.

    What was read is remembered for this process by device, inode, size and the times of the last change of content
    and of the inode. The second cannot be set back. It is remembered only if both were older than the clock's step
    when reading began: any later write then shows in them.

    Raises:
        StreamlineError: the file cannot be read.
    """
    try:
        with file.open("rb") as stream:
            state, begun = _state(stream.fileno()), time.time_ns()
            if state in _known:
                return _known[state]
            found = hashlib.file_digest(stream, "sha256").hexdigest()
            if max(state[-2:]) + _CLOCK_STEP_NS < begun and _state(stream.fileno()) == state:
                _known[state] = found
    except OSError as error:
        raise StreamlineError(f"{file}: cannot be read ({error.strerror})") from None
    return found


def folder_hashes(folder: Path, files: Iterable[str]) -> dict[str, str]:
    """`content_hash` of each file of a folder, by name and in the order of the names; one that is not there has none.

    Args:
        files: Names below `folder`.

    Raises:
        StreamlineError: a file cannot be read.
    """
    return {name: content_hash(folder / name) for name in sorted(files) if (folder / name).is_file()}


def _state(descriptor: int) -> _State:
    found = os.fstat(descriptor)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
