"""Reading files and tables into documents. A file that is not text is refused, naming its first wrong byte."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import struct
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from optimum.streamline.errors import StreamlineError
from optimum.streamline.text.sources import open_text

ROWS = [{"text": "first\nrow", "source": "a", "n": 1}, {"text": "second", "source": "b", "n": 2}]
TABLE_ROWS = "\n".join(json.dumps(row) for row in ROWS)


def read(spec: object) -> list[str]:
    return list(open_text(str(spec)).documents)


def write_parquet(file: Path) -> None:
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), file)


WRITERS: dict[str, Callable[[Path], object]] = {
    "x.parquet": write_parquet,
    "x.jsonl": lambda file: file.write_text(TABLE_ROWS),
    "x.json": lambda file: file.write_text(json.dumps(ROWS)),
    "x.csv": lambda file: file.write_text('text,source,n\n"first\nrow",a,1\nsecond,b,2\n'),
    "x.tsv": lambda file: file.write_text('text\tsource\tn\n"first\nrow"\ta\t1\nsecond\tb\t2\n'),
    "x.jsonl.gz": lambda file: file.write_bytes(gzip.compress(TABLE_ROWS.encode())),
    "x.jsonl.bz2": lambda file: file.write_bytes(bz2.compress(TABLE_ROWS.encode())),
    "x.jsonl.xz": lambda file: file.write_bytes(lzma.compress(TABLE_ROWS.encode())),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_table_is_read_by_its_column(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name)
    assert read(tmp_path / name) == ["first\nrow", "second"]
    assert read(f"{tmp_path / name},source") == ["a", "b"]
    with pytest.raises(StreamlineError, match=rf"{name}: no column 'body'; there are n, source, text"):
        read(f"{tmp_path / name},body")
    with pytest.raises(StreamlineError, match="column 'n' holds int in row 0, which is not text"):
        read(f"{tmp_path / name},n")


@pytest.mark.parametrize(
    ("suffix", "compress"), [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)]
)
def test_compressed_text_is_the_text(tmp_path: Path, suffix: str, compress: Callable[[bytes], bytes]) -> None:
    file = tmp_path / f"x.txt{suffix}"
    file.write_bytes(compress("plain text, ünd mehr".encode()))
    assert read(file) == ["plain text, ünd mehr"]
    file.write_bytes(compress(b"plain text" * 1000)[:-12])
    with pytest.raises(StreamlineError, match=rf"x\.txt{suffix}: cannot be (read|decompressed) \(.+\)$"):
        read(file)


def test_text_of_any_name_is_text(tmp_path: Path) -> None:
    for name in ("LICENSE", "notes.org", "with,comma.txt"):
        (tmp_path / name).write_bytes("\ufeffone\r\ntwo\rthree".encode())
        assert read(tmp_path / name) == ["one\ntwo\nthree"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model.safetensors", struct.pack("<Q", 60) + b'{"a":{}}', "byte 1 is NUL; it seems to be a model's weights"),
        ("weights.bin", b"PK\x03\x04\x00\x00", "byte 4 is NUL; it seems to be a zip archive"),
        ("picture.txt", b"\x89PNG\r\n\x1a\n\x00", "is NUL; it seems to be a picture"),
        ("text.txt", gzip.compress(b"text", mtime=1), "it seems to be gzip; name it .gz"),
        ("zst.txt", b"\x28\xb5\x2f\xfd\x00", "it seems to be Zstandard; name it .zst, and `pip install zstandard`"),
        ("rows.txt", b"PAR1\x15\x04\x00", "it seems to be Parquet; name it .parquet"),
        ("utf16.txt", "text".encode("utf-16"), "is NUL; it seems to be UTF-16; save it as UTF-8"),
        ("latin.txt", "naïve".encode("latin-1"), "is not text in UTF-8, byte 2 is 0xef"),
        ("bom.txt", b"\xef\xbb\xbfab\xff", "is not text in UTF-8, byte 5 is 0xff"),
        ("nul.txt", b"abc\0def", "is not text, byte 3 is NUL$"),
        ("pointer.txt", b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "a git-lfs pointer and not the"),
        ("rows.parquet", b"version https://git-lfs.github.com/spec/v1", r"rows.parquet: cannot be read \(.+\)"),
        ("rows.jsonl", b'{"text": "a"}\n{broken', r"rows.jsonl: cannot be read \(.+\)"),
        ("numbers.csv", b"a,b\n1,2\n", "no column of text; there are a, b"),
        ("two.csv", b"a,b\nx,y\n", "name the column, one of a, b"),
    ],
)
def test_what_is_not_text_is_refused_in_a_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(StreamlineError, match=message) as caught:
        read(tmp_path / name)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["x.txt.zst", "x.jsonl.zst"])
def test_zstandard_without_its_package_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr("optimum.streamline.text.files.find_spec", lambda _: None)
    (tmp_path / name).write_bytes(b"\x28\xb5\x2f\xfd")
    with pytest.raises(StreamlineError, match=rf"{name}: needs the package zstandard: pip install zstandard$"):
        read(tmp_path / name)


def test_a_plain_file_has_no_columns(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("text")
    with pytest.raises(StreamlineError, match="column 'text': it is not a table; leave the column out"):
        read(f"{tmp_path / 'x.txt'},text")


# WikiText as on the Hub: one line per row, and an empty string for each blank line.
ARTICLES = ["", " = Home = \n", "", " A first line . \n", " = = Plot = = \n", "", " 1 = 1 . \n", ""]
ARTICLES += [" = Away = \n", "", " Another article . \n", ""]
HOME = " = Home = \n\n A first line . \n = = Plot = = \n\n 1 = 1 . \n\n"
AWAY = " = Away = \n\n Another article . \n\n"


def write_rows(file: Path, rows: list[str | None]) -> Path:
    parquet.write_table(pyarrow.table({"text": rows}), file)
    return file


def test_rows_that_are_lines_are_joined_to_articles(tmp_path: Path) -> None:
    table = write_rows(tmp_path / "x.parquet", [*ARTICLES])
    (tmp_path / "other").mkdir()
    rows = tmp_path / "other" / "x.jsonl"
    rows.write_text("\n".join(json.dumps({"text": row}) for row in ARTICLES))
    for spec in (table, rows, f"hub:{rows.parent}"):
        assert read(spec) == [HOME, AWAY]


def test_an_article_ends_with_its_part_of_the_data_set(tmp_path: Path) -> None:
    for part in ("0", "1"):
        write_rows(tmp_path / f"train-{part}.parquet", [f"line {part}\n", "more\n"])
    assert sorted(read(f"hub:{tmp_path}")) == ["line 0\nmore\n", "line 1\nmore\n"]


def test_other_rows_are_documents(tmp_path: Path) -> None:
    # Rows without a newline, rows of several lines such as source files, and single lines between them.
    rows = ["a", "", "b", "one\ntwo\n", None, "three\nfour\n", "a line\n", "c", "last\n", "line\n"]
    expected = ["a", "b", "one\ntwo\n", "three\nfour\n", "a line\n", "c", "last\nline\n"]
    assert read(write_rows(tmp_path / "x.parquet", rows)) == expected


def test_a_joined_document_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("optimum.streamline.text.files.MAX_JOINED_CHARACTERS", 30)
    rows: list[str | None] = [f"line {number}\n" for number in range(100)]
    documents = read(write_rows(tmp_path / "x.parquet", rows))
    assert "".join(documents) == "".join(str(row) for row in rows)
    assert {len(document.splitlines()) for document in documents[:-1]} == {4, 5}


def test_reading_a_table_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    write_parquet(tmp_path / "x.parquet")
    read(tmp_path / "x.parquet")
    assert [file.name for file in tmp_path.iterdir()] == ["x.parquet"]
