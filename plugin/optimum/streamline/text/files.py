"""Files into documents, by their kind: plain text, or tables of which one column is text.

A plain file is one document. So is a table's row, but for rows that are lines of one running text, as WikiText's are:
these are joined. What is not text is refused; no byte is guessed or replaced. This file knows neither SPECs nor tokens;
see `sources.py`.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import fsspec

from optimum.streamline.errors import StreamlineError, first_line

PLAIN = (".md", ".py", ".rst", ".text", ".txt")
# The reader of `datasets`, and its options.
TABLES: dict[str, tuple[str, dict[str, str]]] = {
    ".csv": ("csv", {}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".parquet": ("parquet", {}),
    ".tsv": ("csv", {"sep": "\t"}),
}
COMPRESSED = (".bz2", ".gz", ".xz", ".zst")
# A row that is such a line begins a document: the title of an article of WikiText, whose sections are ` = = Name = = `.
_TITLE = re.compile(r" = [^=]+ = \n")
# Rows that are lines are joined to a document of about so many characters at most.
LONGEST = 200_000
# What a file seems to be that begins so: for messages only, nothing is read by it, which is worth no library.
_BEGINNINGS = {
    b"version https://git-lfs": "a git-lfs pointer and not the file itself; fetch it with `git lfs pull`",
    b"\x1f\x8b": "gzip; name it .gz",
    b"BZh": "bzip2; name it .bz2",
    b"\xfd7zXZ\x00": "xz; name it .xz",
    b"\x28\xb5\x2f\xfd": "Zstandard; name it .zst, and `pip install zstandard`",
    b"PK\x03\x04": "a zip archive; unpack it",
    b"PAR1": "Parquet; name it .parquet",
    b"\x89PNG": "a picture",
    b"\xff\xd8\xff": "a picture",
    b"GIF8": "a picture",
    b"%PDF": "a PDF",
    b"GGUF": "a model's weights (GGUF)",
    b"\x80\x02": "a Python pickle",
    b"\x7fELF": "a program",
    codecs.BOM_UTF16_LE: "UTF-16; save it as UTF-8",
    codecs.BOM_UTF16_BE: "UTF-16; save it as UTF-8",
}


def kind_of(file: Path) -> str:
    """The suffix that decides how a file is read: a key of `TABLES`, one of `PLAIN`, or empty for any other."""
    suffixes = [suffix.lower() for suffix in file.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    suffix = suffixes[-1] if suffixes else ""
    return suffix if suffix in TABLES or suffix in PLAIN else ""


def read_files(files: Iterable[Path], column: str = "") -> Iterator[str]:
    """The documents of files, in their order, those that are blank left out.

    Args:
        column: Of tables; the one column of text, or the one called `text`, by default.

    Raises:
        StreamlineError: a file is not text, cannot be read, or has no such column.
    """
    for file in files:
        if file.suffix.lower() == ".zst" and find_spec("zstandard") is None:
            raise StreamlineError(f"text file {file}: needs the package zstandard: pip install zstandard")
        if kind_of(file) in TABLES:
            yield from _table(file, column)
            continue
        if column:
            raise StreamlineError(f"text file {file}: column {column!r}: it is not a table; leave the column out")
        text = plain_text(file)
        if text.strip():
            yield text


def plain_text(file: Path) -> str:
    """The text of a plain file in UTF-8, decompressed where its name says that it is compressed.

    Raises:
        StreamlineError: its bytes are not text, naming the first that is not.
    """
    try:
        compression = "infer" if file.suffix.lower() in COMPRESSED else None
        with fsspec.open(str(file), "rb", compression=compression) as stream:
            content: bytes = stream.read()
    except (OSError, EOFError, ValueError, ImportError) as error:  # of the disk, of the decompressors, of lack of one
        raise StreamlineError(f"text file {file}: cannot be read ({_reason(error)})") from None
    except Exception as error:  # lzma and zlib each have their own
        raise StreamlineError(f"text file {file}: cannot be decompressed ({first_line(error)})") from None
    seems = f"; it seems to be {kind}" if (kind := _seems(content)) else ""
    if content.startswith(b"version https://git-lfs"):
        raise StreamlineError(f"text file {file}: is not text{seems}")
    if (nul := content.find(b"\0")) >= 0:
        raise StreamlineError(f"text file {file}: is not text, byte {nul} is NUL{seems}")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        offset = error.start + len(content) - len(error.object)  # the object is without the byte order mark
        raise StreamlineError(
            f"text file {file}: is not text in UTF-8, byte {offset} is 0x{content[offset]:02x}{seems}"
        ) from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _seems(content: bytes) -> str:
    for beginning, kind in _BEGINNINGS.items():
        if content.startswith(beginning):
            return kind
    # Its header's length in 8 bytes, and then the header, which is JSON.
    return "a model's weights (safetensors)" if content[8:9] == b"{" and content[4:8] == bytes(4) else ""


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or first_line(error)


def _table(file: Path, column: str) -> Iterator[str]:
    from datasets import load_dataset

    name, options = TABLES[kind_of(file)]
    named = f"text file {file}"
    # `datasets` keeps locks in its cache even of what it only streams.
    with TemporaryDirectory(prefix="streamline-") as cache, table_errors(named):
        rows = load_dataset(name, data_files=str(file), split="train", streaming=True, cache_dir=cache, **options)
        yield from texts_of(named, [rows], column)


@contextmanager
def table_errors(named: str, advice: str = "") -> Iterator[None]:
    """Make what `datasets` raises one line.

    Args:
        named: What the line calls the table.
        advice: What it ends with.
    """
    try:
        yield
    except StreamlineError:
        raise
    except Exception as error:  # datasets raises whatever its readers and its transport raise
        raise StreamlineError(f"{named}: cannot be read ({first_line(error)}){advice}") from None


def texts_of(named: str, parts: Iterable[Iterable[dict[str, Any]]], column: str) -> Iterator[str]:
    """The documents in one column of a table, those that are blank or missing left out.

    A row is a document. Rows of one line each, which ends in a newline, are lines of one text and are joined, blank
    rows between them too. Such a document ends before a title as WikiText's articles have it, before a row of another
    kind, with its part, and at `LONGEST` characters.

    Args:
        named: What messages call the table.
        parts: The rows of each part.
        column: Its name; empty for the one column of text, or the one called `text`.

    Raises:
        StreamlineError: there is no such column, or what stands in it is not text.
    """
    lines: list[str] = []
    size = 0
    for value in _values(named, parts, column):
        if value is not None and not value.strip():
            lines += ["\n"] if lines else []
            continue
        if lines and (value is None or not _goes_on(value) or size >= LONGEST):
            yield "".join(lines)
            lines, size = [], 0
        if value is not None and _is_line(value):
            lines.append(value)
            size += len(value)
        elif value is not None:
            yield value


def _is_line(value: str) -> bool:
    return value.find("\n") == len(value) - 1


def _goes_on(value: str) -> bool:
    return _is_line(value) and not _TITLE.fullmatch(value)


def _values(named: str, parts: Iterable[Iterable[dict[str, Any]]], column: str) -> Iterator[str | None]:
    """What stands in a column, and `None` where a part ends."""
    for rows in parts:
        for number, row in enumerate(rows):
            column = column or _text_column(named, row)
            if column not in row:
                raise StreamlineError(f"{named}: no column {column!r}; there are {', '.join(sorted(row))}")
            value = row[column]
            if isinstance(value, str):
                yield value
            elif value is not None:
                raise StreamlineError(
                    f"{named}: column {column!r} holds {type(value).__name__} in row {number}, which is not text; "
                    f"there are {', '.join(sorted(row))}"
                )
        yield None


def _text_column(named: str, row: dict[str, Any]) -> str:
    columns = [name for name, value in row.items() if isinstance(value, str)]
    if "text" in columns:
        return "text"
    if len(columns) == 1:
        return columns[0]
    if not columns:
        raise StreamlineError(f"{named}: no column of text; there are {', '.join(sorted(row))}")
    raise StreamlineError(f"{named}: name the column, one of {', '.join(columns)}")
