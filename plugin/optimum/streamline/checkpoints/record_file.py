"""`streamline.json` as other commands read it: which keys it has, and what text went into the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from optimum.streamline.errors import StreamlineError


def text_of(checkpoint: str) -> dict[str, dict[str, Any]]:
    """What text went into a checkpoint, by purpose; nothing is known of one that is not ours."""
    data: dict[str, dict[str, Any]] = (read_record(checkpoint) or {}).get("data", {})
    return data


RECORD_FILE = "streamline.json"
RECORD_KEYS = ("source", "layers", "scores", "recipe_fingerprint", "data")


def read_record(path: str) -> dict[str, Any] | None:
    """The `streamline.json` of a checkpoint of ours; `None` for any other.

    Raises:
        StreamlineError: there is one, but it is broken.
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
