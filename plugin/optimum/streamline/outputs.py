"""Writing a result whole or not at all: beside its final name, then renamed.

Knows nothing of what is written.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import StreamlineError
from .processes import is_main, wait_for_all

# One of these, with this key in it, is in every folder this program writes: only such a folder is ever replaced.
OURS = {
    "streamline.json": "recipe_fingerprint",
    "artifact.json": "source_fingerprint",
    "scores.json": "block_influence",
    "report.json": "verdict",
}


def check_output(path: Path, overwrite: bool = False) -> None:
    """Refuse an output that exists, or that could not be written, before any work is done.

    Raises:
        StreamlineError: `path` exists and is not an empty folder, or is not ours to overwrite, or cannot be written.
    """
    try:
        if path.exists() and not (path.is_dir() and not any(path.iterdir())):
            if not overwrite:
                raise StreamlineError(f"output {path}: exists already; choose another, or pass --overwrite")
            if not _is_ours(path):
                raise StreamlineError(f"output {path}: holds no output of this program, so it is not overwritten")
        parent = path.absolute().parent
        while not parent.exists():
            parent = parent.parent
        if not parent.is_dir() or not os.access(parent, os.W_OK):
            raise StreamlineError(f"output {path}: {parent} cannot be written; choose a folder that can")
    except OSError as error:
        raise StreamlineError(f"output {path}: {error.strerror}") from None


def _is_ours(path: Path) -> bool:
    markers = [(path / name, key) for name, key in OURS.items() if (path / name).is_file()]
    return any(f'"{key}"' in marker.read_text(encoding="utf-8", errors="replace") for marker, key in markers)


def refuse_own_input(path: Path, inputs: Iterable[str]) -> None:
    """Refuse an output folder that holds what it is to be made from.

    Args:
        inputs: Paths of models, text and recipes; what is no path here, such as a Hub id, is passed over.

    Raises:
        StreamlineError: one of them is `path`, or lies below it.
    """
    for name in inputs:
        if Path(name).exists() and Path(name).resolve().is_relative_to(path.resolve()):
            raise StreamlineError(f"output {path}: holds {name!r}, which it is to be made from; choose another")


@contextmanager
def staged_folder(path: Path, inputs: Iterable[str], overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its name when the block ends well, and vanishes otherwise.

    Args:
        inputs: What it is made from, which is never overwritten.

    Raises:
        StreamlineError: as `check_output` and `refuse_own_input`; or somebody else wrote to `path` meanwhile.
    """
    refuse_own_input(path, inputs)
    check_output(path, overwrite)
    path = path.resolve()  # `.` and links have no name of their own to rename to
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise StreamlineError(f"output {path}: {error.strerror}") from None
    try:
        yield staging
        _give_usual_modes(staging)
        _publish(staging, path, overwrite)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def staged_by_main(path: Path, inputs: Iterable[str], overwrite: bool = False) -> Iterator[Path | None]:
    """`staged_folder` of the main process; in the others `None`, until the main one's has taken its name.

    Raises:
        StreamlineError: as `staged_folder`.
    """
    inputs = tuple(inputs)
    refuse_own_input(path, inputs)
    check_output(path, overwrite)
    wait_for_all()  # nobody takes the name before everybody has seen that it is free
    if is_main():
        with staged_folder(path, inputs, overwrite) as staging:
            yield staging
    else:
        yield None
    wait_for_all()


def _give_usual_modes(folder: Path) -> None:
    # Temporary folders, and the weights that safetensors writes, are for their owner's eyes alone: whoever is to
    # serve them may be another user. The umask decides, as for any file.
    umask = os.umask(0)
    os.umask(umask)
    folder.chmod(0o777 & ~umask)
    for entry in folder.rglob("*"):
        entry.chmod((0o777 if entry.is_dir() else 0o666) & ~umask)


def _publish(staging: Path, path: Path, overwrite: bool) -> None:
    try:
        if overwrite and path.is_dir() and any(path.iterdir()):
            # The old folder steps aside first: at no moment is there neither the old one nor the new.
            aside = staging.with_name(f"{staging.name}.old")
            path.rename(aside)
            staging.rename(path)
            shutil.rmtree(aside)
        else:
            # Takes the place of an empty folder, and refuses one that somebody wrote into meanwhile.
            staging.rename(path)
    except OSError as error:
        raise StreamlineError(f"output {path}: {error.strerror}; nothing there was touched") from None


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
