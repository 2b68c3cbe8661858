"""Write an output folder or file completely or not at all.

An output is first written under a temporary name in the same parent folder, and then renamed. A lock file keeps a
second run from writing the same output at the same time. No library does this: filelock leaves its file beside the
output and fails on a file system without locks, and atomicwrites writes single files and is no longer maintained.
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

REPORT_FILE = "report.json"
"""The file name of a report as JSON, in the output folder of `run`, `validate` and `orthogonality`."""

# Each output folder of this program holds at least one of these JSON files, with this key in it. `--overwrite` replaces
# only a folder that does.
OUTPUT_MARKERS = {
    "streamline.json": "recipe_fingerprint",
    "artifact.json": "source_fingerprint",
    "quantization.json": "quantize",
    "scores.json": "block_influence",
    REPORT_FILE: "verdict",
}


def check_output(path: Path, overwrite: bool = False) -> None:
    """Refuse an output path that is taken or cannot be written, before any work is done.

    Args:
        path: The folder or file to write.
        overwrite: Whether an earlier output of this program at `path` may be replaced.

    Raises:
        StreamlineError: `path` exists, is not an empty folder, and `overwrite` is false; or it holds something that
            this program did not write; or its nearest existing parent folder is not writable.
    """
    try:
        if path.exists() and not (path.is_dir() and not any(path.iterdir())):
            if not overwrite:
                raise StreamlineError(f"output {path}: exists already; choose another, or pass --overwrite")
            if not _is_ours(path):
                raise StreamlineError(
                    f"output {path}: holds no output of this program, so --overwrite does not replace it"
                )
        parent = path.absolute().parent
        while not parent.exists():
            parent = parent.parent
        if not parent.is_dir() or not os.access(parent, os.W_OK):
            raise StreamlineError(f"output {path}: {parent} cannot be written; choose a folder that can")
    except OSError as error:
        raise StreamlineError(f"output {path}: {error.strerror}") from None


def _is_ours(path: Path) -> bool:
    """Whether this program wrote the folder `path`."""
    markers = [(path / name, key) for name, key in OUTPUT_MARKERS.items() if (path / name).is_file()]
    return any(f'"{key}"' in marker.read_text(encoding="utf-8", errors="replace") for marker, key in markers)


def refuse_own_input(path: Path, inputs: Iterable[str]) -> None:
    """Refuse an output folder that contains an input of the same run.

    Args:
        path: The output folder.
        inputs: Paths of models, texts and recipes. A name that is not an existing path, such as a Hub id, is ignored.

    Raises:
        StreamlineError: an input is `path`, or lies below it.
    """
    for name in inputs:
        # `os.path.exists` returns False for a name that is too long for a path; `Path.exists` raises.
        if os.path.exists(name) and Path(name).resolve().is_relative_to(path.resolve()):
            raise StreamlineError(f"output {path}: contains the input {name!r}; choose another")


@contextmanager
def staged_folder(path: Path, inputs: Iterable[str], overwrite: bool = False) -> Iterator[Path]:
    """Give a temporary folder that is renamed to `path` if the `with` block succeeds, and deleted if it fails.

    Args:
        path: The output folder. It is locked until the block ends.
        inputs: The inputs of the run. They are never overwritten.
        overwrite: Whether an earlier output of this program at `path` may be replaced.

    Yields:
        The temporary folder to write into.

    Raises:
        StreamlineError: as `locked_output`; or another program wrote to `path` in the meantime.
    """
    with locked_output(path, inputs, overwrite), _staged(path, overwrite) as staging:
        yield staging


@contextmanager
def locked_output(path: Path, inputs: Iterable[str], overwrite: bool = False) -> Iterator[None]:
    """Lock `path` against other runs while the `with` block lasts.

    The operating system releases the lock if this process is killed.

    Args:
        path: The output folder.
        inputs: The inputs of the run. They are never overwritten.
        overwrite: Whether an earlier output of this program at `path` may be replaced.

    Raises:
        StreamlineError: as `check_output` and `refuse_own_input`; or another run has locked `path`.
    """
    refuse_own_input(path, inputs)
    check_output(path, overwrite)
    file = _sibling_path(path, "lock")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor = _open_locked(file)
    except BlockingIOError:
        raise StreamlineError(
            f"output {path}: another run is writing it; choose another, or wait for that run"
        ) from None
    except OSError as error:
        raise StreamlineError(f"output {path}: {error.strerror}") from None
    try:
        check_output(path, overwrite)  # another run may have finished between the first check and the lock
        yield
    finally:
        file.unlink(missing_ok=True)  # before the lock is released: afterwards another run may hold the file
        os.close(descriptor)


@contextmanager
def locked_output_by_main(path: Path, inputs: Iterable[str], overwrite: bool = False) -> Iterator[None]:
    """Lock `path` as `locked_output` does: the main process takes the lock, and every process waits for the result.

    Args:
        path: The output folder.
        inputs: The inputs of the run. They are never overwritten.
        overwrite: Whether an earlier output of this program at `path` may be replaced.

    Raises:
        StreamlineError: as `locked_output`, in every process.
    """
    inputs = tuple(inputs)
    refuse_own_input(path, inputs)
    check_output(path, overwrite)
    wait_for_all()  # no process creates anything at `path` before all of them have checked it
    with ExitStack() as claim:
        refusal: StreamlineError | None = None
        if is_main():
            try:
                claim.enter_context(locked_output(path, inputs, overwrite))
            except StreamlineError as error:
                refusal = error
        refusal = from_main(refusal)
        if refusal is not None:
            raise refusal
        yield


@contextmanager
def staged_by_main(path: Path, overwrite: bool = False) -> Iterator[Path | None]:
    """Give the main process a temporary folder that is renamed to `path` if the `with` block succeeds.

    The main process must hold the lock on `path` already. The other processes get `None`, and leave the block after the
    folder has its final name.

    Args:
        path: The output folder.
        overwrite: Whether an earlier output of this program at `path` may be replaced.

    Yields:
        The temporary folder in the main process, `None` in the others.

    Raises:
        StreamlineError: the folder cannot be written, or another program wrote to `path` in the meantime.
    """
    if is_main():
        with _staged(path, overwrite) as staging:
            yield staging
    else:
        yield None
    wait_for_all()


@contextmanager
def _staged(path: Path, overwrite: bool) -> Iterator[Path]:
    """`staged_folder` without the lock."""
    # The name is fixed, so a run deletes the folder that a killed run left. No other run uses it: `path` is locked.
    staging = _sibling_path(path, "new")
    try:
        if staging.exists():
            shutil.rmtree(staging)
        staging.mkdir(mode=0o700)
    except OSError as error:
        raise StreamlineError(f"output {path}: {error.strerror}") from None
    try:
        yield staging
        _apply_umask(staging)
        _publish(staging, path.resolve(), overwrite)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _sibling_path(path: Path, what: str) -> Path:
    """A hidden path in the parent folder of `path`, for a lock file or a temporary folder."""
    path = path.resolve()  # `.` has no name to build on, and a link may point into another parent folder
    return path.with_name(f".{path.name}.streamline-{what}")


def _open_locked(file: Path) -> int:
    """Create `file` if it does not exist, and lock it.

    Returns:
        A file descriptor that holds the lock until it is closed.

    Raises:
        BlockingIOError: another process holds the lock.
        OSError: the file cannot be created.
    """
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise
        except OSError:
            return descriptor  # a file system without locks, such as Lustre in many clusters: run without one
        # The previous holder may have deleted the file after we opened it. Our lock is then on a deleted file that no
        # other process opens, so try again.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), file.stat()):
                return descriptor
        os.close(descriptor)


def _apply_umask(folder: Path) -> None:
    """Give a folder and its content the permissions that the umask prescribes."""
    # The temporary folder, and the weight files that safetensors writes, are readable by their owner alone. Another
    # user may have to serve them, so apply the umask as for any new file.
    umask = os.umask(0)
    os.umask(umask)
    folder.chmod(0o777 & ~umask)
    for entry in folder.rglob("*"):
        entry.chmod((0o777 if entry.is_dir() else 0o666) & ~umask)


def _publish(staging: Path, path: Path, overwrite: bool) -> None:
    """Rename `staging` to `path`, replacing the old folder if `overwrite` is true."""
    old_folder = _sibling_path(path, "old")
    try:
        if overwrite and path.is_dir() and any(path.iterdir()):
            # Rename the old folder first and delete it last: one of the two is complete at every moment.
            shutil.rmtree(old_folder, ignore_errors=True)
            path.rename(old_folder)
        # `rename` replaces an empty folder, and fails if another program has written into it.
        staging.rename(path)
    except OSError as error:
        raise StreamlineError(f"output {path}: {error.strerror}; nothing was changed") from None
    # Also when nothing was replaced now: a run that was killed between the two renames left a folder of this name.
    shutil.rmtree(old_folder, ignore_errors=True)


def write_file(path: Path, text: str) -> None:
    """Write a text file under a temporary name in the same folder, then rename it to `path`.

    Args:
        path: The file. Its parent folders are created.
        text: The content, written in UTF-8.

    Raises:
        StreamlineError: the file cannot be written.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise StreamlineError(f"output {path}: {error.strerror}") from None
