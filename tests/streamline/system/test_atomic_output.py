"""An output appears complete or not at all, and no file of another program is overwritten."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from optimum.streamline.errors import StreamlineError
from optimum.streamline.system.atomic_output import check_output, locked_output, staged_folder, write_file


def test_a_folder_appears_when_the_block_ends_well(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with staged_folder(out, ()) as staging:
        (staging / "file").write_text("text")
        assert not out.exists()
    assert (out / "file").read_text() == "text"
    assert list(out.parent.iterdir()) == [out]


def test_nothing_is_left_when_it_does_not(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), staged_folder(tmp_path / "out", ()) as staging:
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
    (out / "streamline.json").write_text('{"recipe_fingerprint": ""}')
    with staged_folder(out, (), overwrite=True) as staging:
        (staging / "new").write_text("")
    assert [file.name for file in out.iterdir()] == ["new"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StreamlineError, match="cannot be written"):
        check_output(tmp_path / "file" / "out", overwrite)
    with (
        pytest.raises(StreamlineError, match="^output /proc/nothing/out: "),
        staged_folder(Path("/proc/nothing/out"), ()),
    ):
        pass


def test_a_file_is_renamed_into_place(tmp_path: Path) -> None:
    write_file(tmp_path / "a" / "b.txt", "text")
    assert (tmp_path / "a" / "b.txt").read_text() == "text"
    assert [file.name for file in (tmp_path / "a").iterdir()] == ["b.txt"]


@pytest.mark.parametrize("model", ["out", "out/onnx-original", "out/../out"])
def test_an_output_never_replaces_its_own_input(tmp_path: Path, model: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "streamline.json").write_text('{"recipe_fingerprint": ""}')
    (out / "onnx-original").mkdir()
    with (
        pytest.raises(StreamlineError, match="contains the input .*; choose another"),
        staged_folder(out, (str(tmp_path / model),), overwrite=True),
    ):
        pass
    assert (out / "streamline.json").exists()


def test_what_can_be_no_path_is_no_input_that_is_overwritten(tmp_path: Path) -> None:
    with staged_folder(tmp_path / "out", ["x" * 300, "hub:a\0b"]) as staging:
        (staging / "file").touch()
    assert (tmp_path / "out" / "file").exists()


def test_a_file_of_a_common_name_does_not_make_a_folder_ours(tmp_path: Path) -> None:
    (tmp_path / "scores.json").write_text('{"chess": [1, 0]}')
    with pytest.raises(StreamlineError, match="holds no output of this program"):
        check_output(tmp_path, overwrite=True)


def test_what_appears_meanwhile_is_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(StreamlineError, match="nothing was changed"), staged_folder(out, ()) as staging:
        (staging / "file").write_text("")
        out.mkdir()
        (out / "notes.txt").write_text("precious")
    assert [file.name for file in out.iterdir()] == ["notes.txt"]
    assert list(tmp_path.iterdir()) == [out]


def assert_claimed(out: Path) -> None:
    with pytest.raises(StreamlineError, match="another run is writing it"), locked_output(out, ()):
        pass


def test_one_run_makes_an_output_at_a_time(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with locked_output(out, ()):
        assert_claimed(out)
        assert_claimed(tmp_path / "missing" / ".." / "out")
        with locked_output(tmp_path / "other", ()):
            pass
        assert_claimed(out)
    with staged_folder(out, ()):
        assert_claimed(out)
    assert list(tmp_path.iterdir()) == [out]


def test_a_lock_that_went_with_its_holder_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock, flock, calls = tmp_path / ".out.streamline-lock", fcntl.flock, []

    def late(descriptor: int, how: int) -> None:
        calls.append(how)
        if len(calls) == 1:
            lock.unlink()  # the previous run ends after we open the lock file and before we lock it
        flock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with locked_output(tmp_path / "out", ()):
        assert_claimed(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_locks_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(descriptor: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    with staged_folder(tmp_path / "out", ()) as staging:
        (staging / "file").write_text("text")
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


KILLED = """
import os, signal, sys
from pathlib import Path
from optimum.streamline.system.atomic_output import staged_folder
rename = Path.rename
def renamed(self, target):
    rename(self, target)
    os.kill(os.getpid(), signal.SIGKILL)  # the old folder has been renamed, the new one not yet
Path.rename = renamed
with staged_folder(Path(sys.argv[1]), (), overwrite=True) as staging:
    (staging / "half").touch()
    if sys.argv[2] == "early":
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("when", ["early", "late"])
def test_what_a_killed_run_leaves_the_next_one_clears_away(tmp_path: Path, when: str) -> None:
    out = tmp_path / "out"
    with staged_folder(out, ()) as staging:
        (staging / "streamline.json").write_text('{"recipe_fingerprint": ""}')
    done = subprocess.run([sys.executable, "-c", KILLED, str(out), when], check=False, capture_output=True)
    assert (done.returncode, done.stderr) == (-9, b"")
    assert out.exists() == (when == "early")
    assert len(list(tmp_path.iterdir())) == 3  # the lock file, the new folder and the old one, under either name
    with staged_folder(out, (), overwrite=True) as staging:
        (staging / "whole").touch()
    assert list(tmp_path.iterdir()) == [out]
    assert [file.name for file in out.iterdir()] == ["whole"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_the_folder_one_stands_in_and_a_link_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    real, link = tmp_path / "real", tmp_path / "link"
    real.mkdir()
    link.symlink_to(real)
    for out in (Path("."), link):
        monkeypatch.chdir(real)
        if overwrite:
            (real / "artifact.json").write_text('{"source_fingerprint": ""}')
        else:
            (real / "file").unlink(missing_ok=True)
        with staged_folder(out, (), overwrite) as staging:
            (staging / "file").write_text("new")
        assert [file.name for file in real.iterdir()] == ["file"]
    assert link.is_symlink()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["link", "real"]


def test_a_name_no_file_system_takes(tmp_path: Path) -> None:
    with pytest.raises(StreamlineError, match="File name too long"):
        check_output(tmp_path / ("x" * 300))


@pytest.mark.parametrize(("umask", "folder", "file"), [(0o022, 0o755, 0o644), (0o077, 0o700, 0o600)])
def test_the_umask_decides_who_may_read(tmp_path: Path, umask: int, folder: int, file: int) -> None:
    before = os.umask(umask)
    try:
        with staged_folder(tmp_path / "out", ()) as staging:
            (staging / "weights").write_text("")
            (staging / "weights").chmod(0o600)
    finally:
        os.umask(before)
    assert (tmp_path / "out").stat().st_mode & 0o777 == folder
    assert (tmp_path / "out" / "weights").stat().st_mode & 0o777 == file
