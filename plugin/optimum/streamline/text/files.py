"""Read text files and tables into documents.

A plain file is one document. In a table, one column is the text and each row is a document. Rows that are single lines
of one running text, as in WikiText, are joined. Files that are not text are refused: no byte is guessed or replaced.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import fsspec

from optimum.streamline.errors import StreamlineError, first_line
from optimum.streamline.system.git_lfs import POINTER_START, is_lfs_pointer

PLAIN = (".md", ".py", ".rst", ".text", ".txt")
# For each table suffix: the builder in `datasets`, and its options.
TABLES: dict[str, tuple[str, dict[str, str]]] = {
    ".csv": ("csv", {}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".parquet": ("parquet", {}),
    ".tsv": ("csv", {"sep": "\t"}),
}
COMPRESSED = (".bz2", ".gz", ".xz", ".zst")
# The title of a WikiText article, which begins a new document. Section headings look like ` = = Name = = `.
_TITLE = re.compile(r" = [^=]+ = \n")
# The number of characters at which a document of joined rows ends.
MAX_JOINED_CHARACTERS = 200_000
# A function from a table's name, its parts and its text column to texts.
_Reader = Callable[[str, Iterable[Iterable[dict[str, Any]]], str], Iterator[str]]
# What a file is that begins with these bytes, for error messages only, which is not worth a library.
_MAGIC_BYTES = {
    POINTER_START: "a git-lfs pointer and not the file itself; fetch it with `git lfs pull`",
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


def file_suffix(file: Path) -> str:
    """The suffix that decides how a file is read, without a compression suffix.

    Returns:
        A key of `TABLES`, one of `PLAIN`, or an empty string for any other suffix.
    """
    suffixes = [suffix.lower() for suffix in file.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    suffix = suffixes[-1] if suffixes else ""
    return suffix if suffix in TABLES or suffix in PLAIN else ""


def read_files(files: Iterable[Path], column: str = "") -> Iterator[str]:
    """Read the documents of several files, in the given order. Blank documents are left out.

    Args:
        files: The files.
        column: The text column of the tables; by default the column `text`, or else the only column of strings.

    Yields:
        The documents.

    Raises:
        StreamlineError: a file is not text, cannot be read, or has no such column.
    """
    for file in files:
        if _is_table(file, column):
            yield from _table(file, column, table_documents)
        elif (text := plain_text(file)).strip():
            yield text


def read_entries(file: Path, column: str = "") -> Iterator[str]:
    """Read a file entry by entry: the rows of a table, or the lines of a plain text file. Blank ones are left out.

    Args:
        file: The file.
        column: As in `read_files`.

    Yields:
        The entries.

    Raises:
        StreamlineError: as `read_files`.
    """
    if _is_table(file, column):
        yield from _table(file, column, _table_entries)
    else:
        yield from (line for line in plain_text(file).split("\n") if line.strip())


def _is_table(file: Path, column: str) -> bool:
    """Whether a file is a table.

    Raises:
        StreamlineError: the package that decompresses it is missing, or it is no table and has a column.
    """
    if file.suffix.lower() == ".zst" and find_spec("zstandard") is None:
        raise StreamlineError(f"text file {file}: needs the package zstandard: pip install zstandard")
    table = file_suffix(file) in TABLES
    if column and not table:
        raise StreamlineError(f"text file {file}: column {column!r}: it is not a table; leave the column out")
    return table


def plain_text(file: Path) -> str:
    """Read a plain text file in UTF-8. A file with a compression suffix is decompressed.

    Returns:
        The text, with line endings as newlines.

    Raises:
        StreamlineError: the file cannot be read, or is not text. The message names the first wrong byte.
    """
    try:
        compression = "infer" if file.suffix.lower() in COMPRESSED else None
        with fsspec.open(str(file), "rb", compression=compression) as stream:
            content: bytes = stream.read()
    except (OSError, EOFError, ValueError, ImportError) as error:  # the disk, the decompressor, or its package
        raise StreamlineError(f"text file {file}: cannot be read ({_reason(error)})") from None
    except Exception as error:  # lzma and zlib raise exceptions of their own
        raise StreamlineError(f"text file {file}: cannot be decompressed ({first_line(error)})") from None
    hint = f"; it seems to be {kind}" if (kind := _guess_kind(content)) else ""
    if is_lfs_pointer(content):
        raise StreamlineError(f"text file {file}: is not text{hint}")
    if (nul := content.find(b"\0")) >= 0:
        raise StreamlineError(f"text file {file}: is not text, byte {nul} is NUL{hint}")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        offset = error.start + len(content) - len(error.object)  # error.object lacks the byte order mark
        raise StreamlineError(
            f"text file {file}: is not text in UTF-8, byte {offset} is 0x{content[offset]:02x}{hint}"
        ) from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _guess_kind(content: bytes) -> str:
    """What a file with this content seems to be, for an error message; empty if unknown."""
    for beginning, kind in _MAGIC_BYTES.items():
        if content.startswith(beginning):
            return kind
    # A safetensors file begins with the header's length in 8 bytes, followed by the header in JSON.
    return "a model's weights (safetensors)" if content[8:9] == b"{" and content[4:8] == bytes(4) else ""


def _reason(error: Exception) -> str:
    """The reason in an exception, without the file name."""
    return getattr(error, "strerror", None) or first_line(error)


def _table(file: Path, column: str, read: _Reader) -> Iterator[str]:
    """Read the texts of a table."""
    from datasets import load_dataset

    builder, options = TABLES[file_suffix(file)]
    table_name = f"text file {file}"
    # Even when it streams, `datasets` writes lock files into its cache, so give it a temporary one.
    with TemporaryDirectory(prefix="streamline-") as cache, table_errors(table_name):
        rows = load_dataset(builder, data_files=str(file), split="train", streaming=True, cache_dir=cache, **options)
        yield from read(table_name, [rows], column)


@contextmanager
def table_errors(table_name: str, advice: str = "") -> Iterator[None]:
    """Turn any exception of `datasets` inside the `with` block into a `StreamlineError` with a one-line message.

    Args:
        table_name: The table's name for the message.
        advice: The end of the message.

    Raises:
        StreamlineError: the block raised an exception.
    """
    try:
        yield
    except StreamlineError:
        raise
    except Exception as error:  # its readers and its HTTP library raise exceptions of their own
        raise StreamlineError(f"{table_name}: cannot be read ({first_line(error)}){advice}") from None


def table_documents(table_name: str, parts: Iterable[Iterable[dict[str, Any]]], column: str) -> Iterator[str]:
    """Read the documents in one column of a table. Blank and missing rows are left out.

    A row is a document. Rows that are single lines ending in a newline are joined into one document, with the blank
    rows between them. A joined document ends at a WikiText title, at a row that is not a single line, at a missing row,
    at the end of its part of the data set, and at about `MAX_JOINED_CHARACTERS` characters.

    Args:
        table_name: The table's name for messages.
        parts: The parts of the data set, each as rows.
        column: The text column; if empty, the column `text`, or else the only column of strings.

    Yields:
        The documents.

    Raises:
        StreamlineError: there is no such column, or a value in it is not a string.
    """
    lines: list[str] = []
    size = 0
    for value in _values(table_name, parts, column):
        if value is not None and not value.strip():
            lines += ["\n"] if lines else []
            continue
        if lines and (value is None or not _continues_document(value) or size >= MAX_JOINED_CHARACTERS):
            yield "".join(lines)
            lines, size = [], 0
        if value is not None and _is_line(value):
            lines.append(value)
            size += len(value)
        elif value is not None:
            yield value


def _table_entries(table_name: str, parts: Iterable[Iterable[dict[str, Any]]], column: str) -> Iterator[str]:
    """The values of a text column, each by itself. Arguments and errors are those of `table_documents`."""
    return (value for value in _values(table_name, parts, column) if value is not None and value.strip())


def _is_line(value: str) -> bool:
    """Whether a row is a single line that ends in a newline."""
    return value.find("\n") == len(value) - 1


def _continues_document(value: str) -> bool:
    """Whether a row continues a document of joined lines."""
    return _is_line(value) and not _TITLE.fullmatch(value)


def _values(table_name: str, parts: Iterable[Iterable[dict[str, Any]]], column: str) -> Iterator[str | None]:
    """The values of a column, and `None` after each part."""
    for rows in parts:
        for number, row in enumerate(rows):
            column = column or _text_column(table_name, row)
            if column not in row:
                raise StreamlineError(f"{table_name}: no column {column!r}; there are {', '.join(sorted(row))}")
            value = row[column]
            if isinstance(value, str):
                yield value
            elif value is not None:
                raise StreamlineError(
                    f"{table_name}: column {column!r} holds {type(value).__name__} in row {number}, which is not text; "
                    f"there are {', '.join(sorted(row))}"
                )
        yield None


def _text_column(table_name: str, row: dict[str, Any]) -> str:
    """The column `text`, or else the only column of strings."""
    columns = [name for name, value in row.items() if isinstance(value, str)]
    if "text" in columns:
        return "text"
    if len(columns) == 1:
        return columns[0]
    if not columns:
        raise StreamlineError(f"{table_name}: no column of text; there are {', '.join(sorted(row))}")
    raise StreamlineError(f"{table_name}: name the column, one of {', '.join(columns)}")
