"""File hashes: cached only if any later change of the file would be noticed."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

import pytest

from optimum.streamline.errors import StreamlineError
from optimum.streamline.system import content_hashes
from optimum.streamline.system.content_hashes import content_hash, folder_hashes


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The files that were read. Every hash is cached, however new the file is."""
    monkeypatch.setattr(content_hashes, "_CLOCK_STEP_NS", -1)
    read: list[object] = []
    digest = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda *how: read.append(how) or digest(*how))
    return read


def test_a_file_that_stays_is_read_once(tmp_path: Path, reads: list[object]) -> None:
    (tmp_path / "file").write_bytes(b"content")
    assert [content_hash(tmp_path / "file") for _ in range(3)] == [sha256(b"content")] * 3
    assert len(reads) == 1


def test_other_content_of_the_same_size_and_time_is_seen(tmp_path: Path, reads: list[object]) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"content")
    times = (file.stat().st_atime_ns, file.stat().st_mtime_ns)
    assert content_hash(file) == sha256(b"content")
    file.write_bytes(b"another")
    os.utime(file, ns=times)
    assert content_hash(file) == sha256(b"another")
    assert len(reads) == 2


def test_a_file_written_again_before_the_clock_ticks_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time_ns()
    monkeypatch.setattr(content_hashes, "_state", lambda _: (0, 0, 7, now, now))
    for content in (b"content", b"another"):
        (tmp_path / "file").write_bytes(content)
        assert content_hash(tmp_path / "file") == sha256(content)


def test_a_file_that_changes_while_it_is_read_is_read_again(
    tmp_path: Path, reads: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, written, digest = tmp_path / "file", [1], hashlib.file_digest
    file.write_bytes(b"content")
    monkeypatch.setattr(content_hashes, "_state", lambda _: (0, 0, 7, *written, *written))
    monkeypatch.setattr(hashlib, "file_digest", lambda *how: written.__setitem__(0, 2) or digest(*how))
    content_hash(file)
    written[0] = 1  # the state that it had when reading began
    content_hash(file)
    assert len(reads) == 2


def test_a_folders_files_are_named_and_missing_ones_left_out(tmp_path: Path) -> None:
    (tmp_path / "b").write_bytes(b"b")
    (tmp_path / "a").write_bytes(b"a")
    (tmp_path / "folder").mkdir()
    assert list(folder_hashes(tmp_path, ("b", "gone", "a", "folder")).items()) == [
        ("a", sha256(b"a")),
        ("b", sha256(b"b")),
    ]


def test_a_file_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(StreamlineError, match=r"gone: cannot be read \(No such file or directory\)"):
        content_hash(tmp_path / "gone")
