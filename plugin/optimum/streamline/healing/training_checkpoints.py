"""The hidden folder beside an output where trainings keep their checkpoints, for a run that is killed to go on from.

Knows nothing of what is in it but for whom it is.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from optimum.streamline.system.atomic_output import write_file
from optimum.streamline.system.distributed import is_main, wait_for_all

from .trainer import WHOLE_FILE, NotFiniteError

KEY_FILE = "key.json"


@contextmanager
def healing_workspace(out: Path, fingerprint: str) -> Iterator[Path]:
    """The place, not yet made, for the checkpoints of a run into `out`.

    It is gone when the block ends well, when a training came to nothing, and where none has saved yet. Whatever else
    ends the block, an interruption, a full disk, a text that cannot be fetched this time, leaves it to be gone on from,
    and says so in a note on the exception.

    Args:
        out: The output, which this run has locked, so that no other run uses the files beside it.
        fingerprint: `Recipe.fingerprint`.
    """
    path = out.resolve()
    workspace = path.with_name(f".{path.name}.healing-{fingerprint[:12]}")
    try:
        yield workspace
    except BaseException as error:
        if isinstance(error, NotFiniteError) or not any(workspace.glob(f"*/*/{WHOLE_FILE}")):
            _remove(workspace)
        else:
            error.add_note(f"checkpoints kept in {workspace}: the same command goes on from them")
        raise
    _remove(workspace)


def open_workspace(workspace: Path, key: dict[str, str]) -> bool:
    """Make the folder, or keep it with what is in it if it was made for `key`; returns whether it was.

    Args:
        key: What its checkpoints hang on: text, model, versions.
    """
    text = json.dumps(key, indent=1, sort_keys=True) + "\n"
    file = workspace / KEY_FILE
    known = file.is_file() and file.read_text(encoding="utf-8", errors="replace") == text
    wait_for_all()  # for every process to have seen the same
    if is_main() and not known:
        _remove(workspace)
        write_file(file, text)
    wait_for_all()
    return known


def _remove(workspace: Path) -> None:
    if is_main():
        shutil.rmtree(workspace, ignore_errors=True)
