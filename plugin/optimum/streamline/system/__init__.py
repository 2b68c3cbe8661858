"""Helpers that know nothing of models.

They write output folders atomically, redirect log messages, show progress bars, coordinate distributed processes, hash
files, measure memory and disks, and describe the machine.
"""

__all__ = [
    "atomic_output",
    "content_hashes",
    "disk",
    "distributed",
    "environment",
    "git_lfs",
    "library_logs",
    "memory",
    "notify",
    "progress",
]
