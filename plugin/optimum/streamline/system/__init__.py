"""What every program needs around its work: whole output folders or none, log files, progress bars, several processes,
the machine's description, hashes of files. Nothing here knows what a model is.
"""

__all__ = ["atomic_output", "content_hashes", "distributed", "environment", "library_logs", "progress"]
