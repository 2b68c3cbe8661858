"""The hidden folder beside an output that keeps the checkpoints of its trainings, so that a stopped run can resume."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from optimum.streamline.editing.plan import Plan
from optimum.streamline.system.atomic_output import write_file
from optimum.streamline.system.distributed import is_main, wait_for_all

from .losses import NotFiniteError
from .settings import COMPLETE_FILE

# Holds the key of `open_workspace`, which tells whether the checkpoints fit a run.
KEY_FILE = "key.json"


@contextmanager
def healing_workspace(out: Path, fingerprint: str) -> Iterator[Path]:
    """Provide the path of the checkpoint folder of a run inside the `with` block, and clean it up afterwards.

    The folder is deleted if the block succeeds, if a training fails with `NotFiniteError`, or if no checkpoint is
    complete yet. After any other failure, such as an interruption or a full disk, the folder stays for the next run,
    and a note on the exception says so.

    Args:
        out: The output, which this run has locked, so that no other run uses the files beside it.
        fingerprint: `Recipe.fingerprint`.

    Yields:
        The path of the checkpoint folder, which may not exist yet.
    """
    path = out.resolve()
    workspace = path.with_name(f".{path.name}.healing-{fingerprint[:12]}")
    try:
        yield workspace
    except BaseException as error:
        if isinstance(error, NotFiniteError) or not any(workspace.rglob(COMPLETE_FILE)):
            _remove(workspace)
        else:
            error.add_note(f"checkpoints kept in {workspace}: the same command resumes from them")
        raise
    _remove(workspace)


def plan_folder(workspace: Path, plan: Plan) -> Path:
    """The folder in the checkpoint folder for the trainings of one plan, one subfolder a training."""
    alone = replace(plan, tried=(), trials=())  # two measurements of the same losses may differ in the last digits
    return workspace / hashlib.sha256(repr(alone).encode()).hexdigest()[:12]


def is_begun(workspace: Path, plan: Plan) -> bool:
    """Whether the checkpoint folder holds a complete checkpoint of a training of a plan."""
    return any(plan_folder(workspace, plan).rglob(COMPLETE_FILE))


def open_workspace(workspace: Path, key: dict[str, str]) -> bool:
    """Prepare the checkpoint folder: keep it if it was made for `key`, otherwise delete it and make an empty one.

    Args:
        workspace: The path of the folder.
        key: Everything that the checkpoints depend on: text, model, versions.

    Returns:
        Whether the folder was kept.
    """
    text = json.dumps(key, indent=1, sort_keys=True) + "\n"
    file = workspace / KEY_FILE
    kept = file.is_file() and file.read_text(encoding="utf-8", errors="replace") == text
    wait_for_all()  # every process must read the file before the main process may replace it
    if is_main() and not kept:
        _remove(workspace)
        write_file(file, text)
    wait_for_all()
    return kept


def _remove(workspace: Path) -> None:
    if is_main():
        shutil.rmtree(workspace, ignore_errors=True)
