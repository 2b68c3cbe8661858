"""Calling `optimum-cli` as a user does, in this process: the same entry point, without a new interpreter each time."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from optimum.commands.optimum_cli import main


@dataclass(frozen=True)
class Outcome:
    """What a user sees of a command."""

    code: int
    out: str
    err: str


def optimum_cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: object) -> Outcome:
    """Run `optimum-cli` with these words."""
    monkeypatch.setattr("sys.argv", ["optimum-cli", *map(str, words)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main()
    seen = capsys.readouterr()
    code = end.value.code
    return Outcome(code if isinstance(code, int) else int(code is not None), seen.out, seen.err)
