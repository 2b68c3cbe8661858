"""Where text comes from: a SPEC names it, `read_documents` yields it.

A SPEC is a text file, a folder of text files, `hub:DATASET[,CONFIG[,SPLIT[,COLUMN]]]`, or
`stdlib[:train|calibration|eval]`. This file knows nothing of tokens; see `windows.py`. Nothing falls
back in silence: a source that cannot be read is an error that names the SPEC and the alternatives.
"""

from __future__ import annotations

import hashlib
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from .errors import StreamlineError

STDLIB_PARTS = ("train", "calibration", "eval")
TEXT_SUFFIXES = {".txt", ".md", ".py", ".rst", ".text"}
HUB_SHUFFLE_BUFFER = 1_000
ALTERNATIVES = (
    "a text file, a folder of text files, hub:DATASET[,CONFIG[,SPLIT[,COLUMN]]], or stdlib[:train|calibration|eval]"
)

# Not in every installation, or tables and machine settings rather than a programmer's text.
_NOT_STDLIB_TEXT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "pydoc_data"}


def stdlib_part(module_path: str) -> str:
    """The part a standard-library file belongs to, from nothing but its path.

    Args:
        module_path: POSIX path below the library's folder, such as `asyncio/events.py`. The rule is a
            hash of it, so a file keeps its part on every Python version and machine.

    >>> stdlib_part("asyncio/events.py")
    'train'
    """
    bucket = hashlib.sha256(module_path.encode()).digest()[0] % 10
    return {0: "calibration", 1: "eval"}.get(bucket, "train")


def read_documents(spec: str, seed: int = 0) -> Iterator[str]:
    """The documents of `spec`, in an order that `seed` decides.

    Raises:
        StreamlineError: the SPEC names nothing that can be read.
    """
    if spec.startswith("stdlib:"):
        return _read_files(_stdlib_files(spec.removeprefix("stdlib:")), seed)
    if spec.startswith("hub:"):
        return _read_hub(spec, seed)
    try:
        path = Path(spec).expanduser()
        if path.is_file():
            return _read_files([path], seed)
    except (OSError, RuntimeError) as error:
        raise StreamlineError(f"text SPEC {spec!r}: {error}; give {ALTERNATIVES}") from None
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in TEXT_SUFFIXES and file.is_file())
        if files:
            return _read_files(files, seed)
        raise StreamlineError(f"text SPEC {spec!r}: the folder holds no {', '.join(sorted(TEXT_SUFFIXES))} file")
    raise StreamlineError(f"text SPEC {spec!r}: no such file or folder; give {ALTERNATIVES}")


def _stdlib_files(part: str) -> list[Path]:
    if part not in STDLIB_PARTS:
        raise StreamlineError(f"text SPEC 'stdlib:{part}': the part must be one of {', '.join(STDLIB_PARTS)}")
    root = Path(sysconfig.get_path("stdlib"))
    files = []
    for file in sorted(root.rglob("*.py")):
        below = file.relative_to(root)
        is_settings = below.name.startswith("_sysconfigdata") or below.parts[0].startswith("config-")
        if _NOT_STDLIB_TEXT.isdisjoint(below.parts) and not is_settings and stdlib_part(below.as_posix()) == part:
            files.append(file)
    if not files:
        raise StreamlineError(f"text SPEC 'stdlib:{part}': this Python has no library source under {root}")
    return files


def _read_files(files: list[Path], seed: int) -> Iterator[str]:
    order = list(files)
    random.Random(seed).shuffle(order)
    for file in order:
        try:
            text = file.read_text(encoding="utf-8", errors="replace")
        except OSError as error:
            raise StreamlineError(f"text file {file}: {error.strerror}") from None
        if text.strip():
            yield text


def _read_hub(spec: str, seed: int) -> Iterator[str]:
    name, config, split, column = (spec.removeprefix("hub:").split(",") + [""] * 4)[:4]
    if not name:
        raise StreamlineError(f"text SPEC {spec!r}: names no data set; give {ALTERNATIVES}")
    try:
        from datasets import load_dataset

        data = load_dataset(name, config or None, split=split or "train", streaming=True)
        for row in data.shuffle(seed=seed, buffer_size=HUB_SHUFFLE_BUFFER):
            chosen = column or _text_column(spec, row)
            if chosen not in row:
                raise StreamlineError(f"text SPEC {spec!r}: no column {chosen!r}; there are {', '.join(sorted(row))}")
            if row[chosen].strip():
                yield row[chosen]
    except StreamlineError:
        raise
    except Exception as error:  # datasets raises whatever its transport raises
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise StreamlineError(f"text SPEC {spec!r} cannot be read ({reason}); give {ALTERNATIVES}") from None


def _text_column(spec: str, row: dict[str, object]) -> str:
    columns = [name for name, value in row.items() if isinstance(value, str)]
    if "text" in columns:
        return "text"
    if len(columns) == 1:
        return columns[0]
    raise StreamlineError(f"text SPEC {spec!r}: name the column, one of {', '.join(columns)}")
