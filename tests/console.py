"""Calling `optimum-cli` as a user does, in this process: the same entry point, without a new interpreter each time."""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass
from functools import cache

import pytest

from optimum.commands import optimum_cli as command_line

# Looks through the metadata of every installed package, so it takes a while, and finds the same each time.
load_subpackages_once = cache(command_line.load_subpackages)


@dataclass(frozen=True)
class Outcome:
    """What a user sees of a command."""

    code: int
    out: str
    err: str


def command(*words: object) -> Outcome:
    """Run `optimum-cli streamline` with these words, for fixtures of a wider scope than a test's."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = _ended(patch, "streamline", *words)
    return Outcome(code, out.getvalue(), err.getvalue())


def optimum_cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: object) -> Outcome:
    """Run `optimum-cli` with these words."""
    capsys.readouterr()
    code = _ended(monkeypatch, *words)
    seen = capsys.readouterr()
    return Outcome(code, seen.out, seen.err)


def _ended(patch: pytest.MonkeyPatch, *words: object) -> int:
    patch.setattr(command_line, "load_subpackages", load_subpackages_once)
    patch.setattr("sys.argv", ["optimum-cli", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        command_line.main()
    code = end.value.code
    return code if isinstance(code, int) else int(code is not None)
