"""Outputs appear whole or not at all, and nothing of somebody else's is overwritten."""

from __future__ import annotations

from pathlib import Path

import pytest

from optimum.streamline.errors import StreamlineError
from optimum.streamline.outputs import check_output, staged_folder, write_file


def test_a_folder_appears_when_the_block_ends_well(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with staged_folder(out) as staging:
        (staging / "file").write_text("text")
        assert not out.exists()
    assert (out / "file").read_text() == "text"
    assert list(out.parent.iterdir()) == [out]


def test_nothing_is_left_when_it_does_not(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), staged_folder(tmp_path / "out") as staging:
        (staging / "file").write_text("text")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_what_exists_is_refused_and_only_ours_is_ever_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    check_output(out)
    (out / "thesis.txt").write_text("years of work")
    with pytest.raises(StreamlineError, match="exists already; choose another, or pass --overwrite"):
        check_output(out)
    with pytest.raises(StreamlineError, match="holds no output of this program"):
        check_output(out, overwrite=True)
    (out / "streamline.json").write_text("{}")
    with staged_folder(out, overwrite=True) as staging:
        (staging / "new").write_text("")
    assert [file.name for file in out.iterdir()] == ["new"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StreamlineError, match="cannot be written"):
        check_output(tmp_path / "file" / "out", overwrite)
    with pytest.raises(StreamlineError, match="^output /proc/nothing/out: "), staged_folder(Path("/proc/nothing/out")):
        pass


def test_a_file_is_renamed_into_place(tmp_path: Path) -> None:
    write_file(tmp_path / "a" / "b.txt", "text")
    assert (tmp_path / "a" / "b.txt").read_text() == "text"
    assert [file.name for file in (tmp_path / "a").iterdir()] == ["b.txt"]
