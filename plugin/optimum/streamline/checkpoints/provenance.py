"""Which bytes a model is, and whether they are those that its own record says were written."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from optimum.streamline.errors import StreamlineError
from optimum.streamline.system.content_hashes import folder_hashes

from .artifact import ARTIFACT_FILE, Artifact, is_artifact
from .record_file import RECORD_FILE, read_record
from .source import ModelSource
from .tokenizer_files import TOKENIZER_FILES
from .weight_files import CONFIG_FILE, weight_and_config_files

# The files beside config and weights that change what a checkpoint gives: tokenizer, generation config and code.
_COMPANION_FILES = (*TOKENIZER_FILES, "generation_config.json", "*.py")


def hashed_files(folder: Path) -> list[str]:
    """Names of the files that decide what a checkpoint computes and how it reads text."""
    patterns = (CONFIG_FILE, *_COMPANION_FILES)
    named = {file.name for pattern in patterns for file in folder.glob(pattern) if file.is_file()}
    with suppress(StreamlineError):  # weights that are gone are files that are not there
        named |= {file.name for file in weight_and_config_files(folder)}
    return sorted(named)


def model_hashes(source: ModelSource) -> dict[str, str]:
    """SHA-256 of each file that a model is, by name: of a checkpoint, or of an export with its description.

    Raises:
        StreamlineError: it cannot be fetched or read, or its description is broken.
    """
    if is_artifact(source.folder):
        artifact = Artifact.read(source.folder)
        return folder_hashes(source.folder, (ARTIFACT_FILE, *artifact.files))
    folder = source.folder
    return folder_hashes(folder, hashed_files(folder))


def write_record(fields: dict[str, Any], folder: Path) -> None:
    """Write `streamline.json` beside a checkpoint, with the hashes of the files that are there.

    Args:
        fields: What else it says; its `files` are those of another folder, and are not kept.
    """
    written = {**fields, "files": folder_hashes(folder, hashed_files(folder))}
    (folder / RECORD_FILE).write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")


def changed_files(source: ModelSource) -> list[str] | None:
    """How the files of a model made here differ from what its record says was written, one phrase a file.

    What was edited before it was quantized counts too: its record is that of the float model.

    Returns:
        `None` where nothing is known: of a model of others, and of one whose record has no hashes.

    Raises:
        StreamlineError: as `model_hashes`; or the record is broken.
    """
    name, fields = _record(source)
    written = fields.get("files")
    if not written or not isinstance(written, dict):
        return None
    return [*fields.get("edited", ()), *_differences(name, written, model_hashes(source))]


def _record(source: ModelSource) -> tuple[str, dict[str, Any]]:
    """The name of a model's record, and what it says; nothing where there is none."""
    if is_artifact(source.folder):
        return ARTIFACT_FILE, {"files": Artifact.read(source.folder).files}
    return RECORD_FILE, read_record(str(source.folder)) or {}


def _differences(record: str, written: dict[str, str], found: dict[str, str]) -> Iterator[str]:
    for name in sorted({*written, *found} - {ARTIFACT_FILE}):
        if name not in found:
            yield f"{name}, which {record} says was written, is gone"
        elif name not in written:
            yield f"{name} is not among the files that {record} says were written"
        elif found[name] != written[name]:
            yield f"{name} is not what {record} says was written"
