"""How much room a disk has, and how a file gets its room before it is written."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path


def free_bytes(folder: Path) -> int:
    """The free room on the disk of a folder that need not exist yet."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def check_room(folder: Path, needed: int) -> None:
    """Refuse what the disk of a folder has no room for.

    Args:
        folder: The folder.
        needed: The bytes that are needed.

    Raises:
        OSError: less is free.
    """
    if needed > free_bytes(folder):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def reserve(file: Path) -> None:
    """Reserve the room of a file that has its size already.

    A file that is mapped into memory needs this: if the disk fills later, a write to the map ends the program
    by a signal.

    Raises:
        OSError: the disk has too little room.
    """
    if not hasattr(os, "posix_fallocate"):
        return
    with file.open("r+b") as opened:
        try:
            os.posix_fallocate(opened.fileno(), 0, file.stat().st_size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # some file systems cannot reserve
                raise
