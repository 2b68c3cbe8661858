"""Read the record of a pruned checkpoint, `streamline.json`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from optimum.streamline.errors import StreamlineError


def recorded_text(checkpoint: str) -> dict[str, dict[str, Any]]:
    """The text that influenced a checkpoint's weights, by purpose, from its record.

    Returns:
        The field `data` of the record; empty for a checkpoint without a record.

    Raises:
        StreamlineError: the record is broken.
    """
    data: dict[str, dict[str, Any]] = (read_record(checkpoint) or {}).get("data", {})
    return data


RECORD_FILE = "streamline.json"
RECORD_KEYS = ("source", "layers", "scores", "recipe_fingerprint", "data")


def read_record(path: str) -> dict[str, Any] | None:
    """Read the `streamline.json` of a checkpoint.

    Returns:
        Its fields; `None` for a checkpoint that this program did not make.

    Raises:
        StreamlineError: the file is not JSON, or lacks a key of `RECORD_KEYS`.
    """
    file = Path(path) / RECORD_FILE
    if not file.is_file():
        return None
    try:
        record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        missing = [key for key in RECORD_KEYS if key not in record]
    except (ValueError, TypeError):
        missing = list(RECORD_KEYS)
    if missing:
        raise StreamlineError(f"{file}: not a record of this program, it lacks {missing[0]!r}")
    return record
