"""Writing a result whole or not at all, by one run at a time: beside its final name, then renamed.

Knows nothing of what is written. The lock is not filelock's, which leaves its file beside the output and raises on a
file system without locks; atomicwrites, for single files, is no longer maintained, and no library publishes a folder.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from optimum.streamline.errors import StreamlineError

from .distributed import from_main, is_main, wait_for_all

# One of these, with this key in it, is in every folder this program writes: only such a folder is ever replaced.
OURS = {
    "streamline.json": "recipe_fingerprint",
    "artifact.json": "source_fingerprint",
    "quantization.json": "quantize",
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
        # Of the two `exists`, the one that takes a name no path can have, such as one that is too long.
        if os.path.exists(name) and Path(name).resolve().is_relative_to(path.resolve()):
            raise StreamlineError(f"output {path}: holds {name!r}, which it is to be made from; choose another")


@contextmanager
def staged_folder(path: Path, inputs: Iterable[str], overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its name when the block ends well, and vanishes otherwise.

    Args:
        inputs: What it is made from, which is never overwritten.

    Raises:
        StreamlineError: as `claimed`; or somebody else wrote to `path` meanwhile.
    """
    with claimed(path, inputs, overwrite), _staged(path, overwrite) as staging:
        yield staging


@contextmanager
def claimed(path: Path, inputs: Iterable[str], overwrite: bool = False) -> Iterator[None]:
    """Keep every other run off `path` while the block lasts; if this one is killed, the system lets go of it.

    Raises:
        StreamlineError: as `check_output` and `refuse_own_input`; or another run has claimed it.
    """
    refuse_own_input(path, inputs)
    check_output(path, overwrite)
    file = _beside(path, "lock")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor = _locked(file)
    except BlockingIOError:
        raise StreamlineError(f"output {path}: another run is making it; choose another, or wait for its end") from None
    except OSError as error:
        raise StreamlineError(f"output {path}: {error.strerror}") from None
    try:
        check_output(path, overwrite)  # another run may have made it since
        yield
    finally:
        file.unlink(missing_ok=True)  # before it is let go of: afterwards it may be another run's
        os.close(descriptor)


@contextmanager
def claimed_by_main(path: Path, inputs: Iterable[str], overwrite: bool = False) -> Iterator[None]:
    """`claimed` of the main process, for all of them.

    Raises:
        StreamlineError: as `claimed`; in every process.
    """
    inputs = tuple(inputs)
    refuse_own_input(path, inputs)
    check_output(path, overwrite)
    wait_for_all()  # nobody writes there before everybody has seen that it is free
    with ExitStack() as claim:
        refusal: StreamlineError | None = None
        if is_main():
            try:
                claim.enter_context(claimed(path, inputs, overwrite))
            except StreamlineError as error:
                refusal = error
        refusal = from_main(refusal)
        if refusal is not None:
            raise refusal
        yield


@contextmanager
def staged_by_main(path: Path, overwrite: bool = False) -> Iterator[Path | None]:
    """`staged_folder` of the main process, which has claimed `path`; in the others `None`, until it has its name.

    Raises:
        StreamlineError: it cannot be written, or somebody else wrote to `path` meanwhile.
    """
    if is_main():
        with _staged(path, overwrite) as staging:
            yield staging
    else:
        yield None
    wait_for_all()


@contextmanager
def _staged(path: Path, overwrite: bool) -> Iterator[Path]:
    # Of a fixed name, so that a run clears away what one that was killed left: nobody else is at it, `path` is claimed.
    staging = _beside(path, "new")
    try:
        if staging.exists():
            shutil.rmtree(staging)
        staging.mkdir(mode=0o700)
    except OSError as error:
        raise StreamlineError(f"output {path}: {error.strerror}") from None
    try:
        yield staging
        _give_usual_modes(staging)
        _publish(staging, path.resolve(), overwrite)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _beside(path: Path, what: str) -> Path:
    path = path.resolve()  # `.` and links have no name of their own to go by, and nothing beside them to rename
    return path.with_name(f".{path.name}.streamline-{what}")


def _locked(file: Path) -> int:
    """A descriptor of `file`, made if need be, that holds its lock.

    Raises:
        BlockingIOError: another one holds it.
        OSError: it cannot be made.
    """
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise
        except OSError:
            return descriptor  # a file system without locks, as Lustre's often is: no reason not to work there
        # Who held it may have removed the file just now: the lock is then on nothing that others would look at.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), file.stat()):
                return descriptor
        os.close(descriptor)


def _give_usual_modes(folder: Path) -> None:
    # Temporary folders, and the weights that safetensors writes, are for their owner's eyes alone: whoever is to
    # serve them may be another user. The umask decides, as for any file.
    umask = os.umask(0)
    os.umask(umask)
    folder.chmod(0o777 & ~umask)
    for entry in folder.rglob("*"):
        entry.chmod((0o777 if entry.is_dir() else 0o666) & ~umask)


def _publish(staging: Path, path: Path, overwrite: bool) -> None:
    aside = _beside(path, "old")
    try:
        if overwrite and path.is_dir() and any(path.iterdir()):
            # The old folder steps aside first: at no moment is there neither the old one nor the new.
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
        # Takes the place of an empty folder, and refuses one that somebody wrote into meanwhile.
        staging.rename(path)
    except OSError as error:
        raise StreamlineError(f"output {path}: {error.strerror}; nothing there was touched") from None
    # Also where there was none this time: a run that was killed between the two renamings left one.
    shutil.rmtree(aside, ignore_errors=True)


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
