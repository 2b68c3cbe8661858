"""What other libraries print and log goes to a file, and afterwards to the terminal again."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from optimum.streamline.system.library_logs import captured_logs


@pytest.fixture
def logger(capsys: pytest.CaptureFixture[str]) -> Iterator[logging.Logger]:
    """A library's logger, with a handler that it made of the terminal's stream when it was imported."""
    logger, handler = logging.getLogger("some_library"), logging.StreamHandler(sys.stderr)
    logger.addHandler(handler)
    logger.propagate = False
    yield logger
    logger.removeHandler(handler)


def speak(logger: logging.Logger) -> None:
    print("printed")
    print("printed as an error", file=sys.stderr)
    logger.warning("logged")


SPOKEN = ("printed\n", "printed as an error\n", "logged\n")


def test_it_goes_to_the_file_and_not_to_the_terminal(
    logger: logging.Logger, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "library.log"
    log.write_text("before\n")
    with captured_logs(log):
        speak(logger)
    assert capsys.readouterr() == ("", "")
    text = log.read_text()
    assert text.startswith("before\n")
    for words in SPOKEN:
        assert words in text
    speak(logger)
    seen = capsys.readouterr()
    assert seen.out == "printed\n"
    assert "logged" in seen.err
    assert log.read_text() == text


def test_a_handler_made_inside_speaks_to_the_terminal_afterwards(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logger = logging.getLogger("imported_inside")
    with captured_logs(tmp_path / "library.log"):
        logger.addHandler(logging.StreamHandler(sys.stderr))
        logger.warning("inside")
    logger.warning("after")
    assert (tmp_path / "library.log").read_text() == "inside\n"
    assert "after" in capsys.readouterr().err


def test_without_a_file_it_is_dropped_and_with_verbose_it_is_left(
    logger: logging.Logger, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with captured_logs(None):
        speak(logger)
    assert capsys.readouterr() == ("", "")
    with captured_logs(tmp_path / "library.log", verbose=True):
        speak(logger)
    assert capsys.readouterr().out == "printed\n"
    assert not (tmp_path / "library.log").exists()
