"""What other libraries print and log goes to a file, and afterwards to the terminal again."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from optimum.streamline.system.library_logs import captured_logs


@contextmanager
def library(name: str = "some_library") -> Iterator[logging.Logger]:
    """A library's logger, with a handler that it made of the terminal's stream when it was imported."""
    logger, handler = logging.getLogger(name), logging.StreamHandler(sys.stderr)
    logger.addHandler(handler)
    logger.propagate = False
    yield logger
    logger.removeHandler(handler)


def speak(logger: logging.Logger) -> None:
    print("printed")
    print("printed as an error", file=sys.stderr)
    logger.warning("logged")


SPOKEN = ("printed\n", "printed as an error\n", "logged\n")


def test_it_goes_to_the_file_and_not_to_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "library.log"
    log.write_text("before\n")
    with library() as logger:
        with captured_logs(log):
            speak(logger)
        assert capsys.readouterr() == ("", "")
        text = log.read_text()
        assert text == "before\n" + "".join(SPOKEN)
        speak(logger)
    seen = capsys.readouterr()
    assert (seen.out, seen.err) == (SPOKEN[0], SPOKEN[1] + SPOKEN[2])
    assert log.read_text() == text


def test_a_handler_made_inside_speaks_to_the_terminal_afterwards(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with ExitStack() as stack:
        with captured_logs(tmp_path / "library.log"):
            logger = stack.enter_context(library("imported_inside"))
            logger.warning("inside")
        logger.warning("after")
    assert (tmp_path / "library.log").read_text() == "inside\n"
    assert capsys.readouterr() == ("", "after\n")


def test_without_a_file_it_is_dropped_and_with_verbose_it_is_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with library() as logger:
        with captured_logs(None):
            speak(logger)
        assert capsys.readouterr() == ("", "")
        with captured_logs(tmp_path / "library.log", verbose=True):
            speak(logger)
    assert capsys.readouterr() == (SPOKEN[0], SPOKEN[1] + SPOKEN[2])
    assert not (tmp_path / "library.log").exists()
