"""Hash the files of a model, and compare them with the hashes in its own record."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from optimum.streamline.errors import StreamlineError
from optimum.streamline.model_files.artifact import ARTIFACT_FILE, Artifact, is_artifact
from optimum.streamline.model_files.source import ModelSource
from optimum.streamline.model_files.tokenizer_files import TOKENIZER_FILES
from optimum.streamline.model_files.weight_files import CONFIG_FILE, weight_and_config_files
from optimum.streamline.system.content_hashes import folder_hashes

from .record_file import RECORD_FILE, read_record

# The files beside config and weights that change what a checkpoint gives: tokenizer, generation config and code.
_COMPANION_FILES = (*TOKENIZER_FILES, "generation_config.json", "*.py")


def hashed_files(folder: Path) -> list[str]:
    """Names of the files that a record holds hashes of: all that decide what the checkpoint computes and reads."""
    patterns = (CONFIG_FILE, *_COMPANION_FILES)
    named = {file.name for pattern in patterns for file in folder.glob(pattern) if file.is_file()}
    with suppress(StreamlineError):  # a checkpoint whose weights are missing still has its other files
        named |= {file.name for file in weight_and_config_files(folder)}
    return sorted(named)


def model_hashes(source: ModelSource) -> dict[str, str]:
    """SHA-256 of each file of a model, by name.

    Args:
        source: A checkpoint, or an artifact. The hashes of an artifact include `artifact.json`.

    Raises:
        StreamlineError: the model cannot be fetched or read, or its `artifact.json` is broken.
    """
    if is_artifact(source.folder):
        artifact = Artifact.read(source.folder)
        return folder_hashes(source.folder, (ARTIFACT_FILE, *artifact.files))
    folder = source.folder
    return folder_hashes(folder, hashed_files(folder))


def write_record(fields: dict[str, Any], folder: Path) -> None:
    """Write `streamline.json` into a checkpoint's folder, with the hashes of the files in it.

    Args:
        fields: The other fields of the record. A field `files` is replaced.
        folder: The checkpoint's folder.
    """
    written = {**fields, "files": folder_hashes(folder, hashed_files(folder))}
    (folder / RECORD_FILE).write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")


def changed_files(source: ModelSource) -> list[str] | None:
    """Compare the files of a model that this program made with the hashes in its record.

    A model that was changed before it was quantized counts as changed: its record keeps the changes of the float model
    in `edited`.

    Returns:
        One phrase for each file that was changed, added or deleted; `None` if the model has no record or the record has
        no hashes.

    Raises:
        StreamlineError: as `model_hashes`; or the record is broken.
    """
    name, fields = _record(source)
    written = fields.get("files")
    if not written or not isinstance(written, dict):
        return None
    return [*fields.get("edited", ()), *_differences(name, written, model_hashes(source))]


def _record(source: ModelSource) -> tuple[str, dict[str, Any]]:
    """The file name of a model's record, and its fields; no fields if there is no record."""
    if is_artifact(source.folder):
        return ARTIFACT_FILE, {"files": Artifact.read(source.folder).files}
    return RECORD_FILE, read_record(str(source.folder)) or {}


def _differences(record: str, written: dict[str, str], found: dict[str, str]) -> Iterator[str]:
    """One phrase for each file that differs between the hashes in a record and the current ones."""
    for name in sorted({*written, *found} - {ARTIFACT_FILE}):
        if name not in found:
            yield f"{name}, which {record} says was written, is gone"
        elif name not in written:
            yield f"{name} is not among the files that {record} says were written"
        elif found[name] != written[name]:
            yield f"{name} is not what {record} says was written"
