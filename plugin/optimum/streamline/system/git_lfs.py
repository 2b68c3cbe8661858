"""Recognize Git LFS pointers: short text files in place of large files that were not downloaded.

The Git LFS specification (docs/spec.md) fixes the beginning of a pointer and limits it to fewer than 1024 bytes.
"""

from __future__ import annotations

POINTER_START = b"version https://git-lfs"
POINTER_LIMIT = 1024
"""Every pointer has fewer bytes than this."""


def is_lfs_pointer(content: bytes) -> bool:
    """Whether a file is a Git LFS pointer.

    Args:
        content: The file's content, or at least its first `POINTER_LIMIT` bytes.
    """
    return len(content) < POINTER_LIMIT and content.startswith(POINTER_START)
