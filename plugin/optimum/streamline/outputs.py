"""Writing a result whole or not at all: beside its final name, then renamed.

Knows nothing of what is written.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import StreamlineError

# One of these is in every folder this program writes: only such a folder is ever replaced.
OURS = ("streamline.json", "artifact.json", "scores.json", "report.json")


def check_output(path: Path, overwrite: bool = False) -> None:
    """Refuse an output that exists, or that could not be written, before any work is done.

    Raises:
        StreamlineError: `path` exists and is not an empty folder, or is not ours to overwrite, or cannot be written.
    """
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        if not overwrite:
            raise StreamlineError(f"output {path}: exists already; choose another, or pass --overwrite")
        if not any((path / name).exists() for name in OURS):
            raise StreamlineError(f"output {path}: holds no output of this program, so it is not overwritten")
    parent = path.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise StreamlineError(f"output {path}: {parent} cannot be written; choose a folder that can")


@contextmanager
def staged_folder(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its name when the block ends well, and vanishes otherwise.

    Raises:
        StreamlineError: as `check_output`.
    """
    check_output(path, overwrite)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.absolute().parent))
    except OSError as error:
        raise StreamlineError(f"output {path}: {error.strerror}") from None
    try:
        staging.chmod(0o755)
        yield staging
        if path.exists():
            shutil.rmtree(path)
        staging.rename(path)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def write_file(path: Path, text: str) -> None:
    """Write a text file beside its final name and rename it.

    Raises:
        StreamlineError: it cannot be written.
    """
    beside = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)
    except OSError as error:
        raise StreamlineError(f"output {path}: {error.strerror}") from None
