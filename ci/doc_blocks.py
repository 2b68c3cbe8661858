"""A pytest plugin that runs the code blocks of Markdown pages: `pytest -p doc_blocks docs/tutorial.md`.

Blocks of `python` and of `bash` run in the order they stand in, all pages in one empty folder that holds `examples`:
a page can use what an earlier page made. `<!-- skip: next "needs a GPU" -->` before a block keeps it from running, and
says why; `tests/test_docs.py` then still checks its flags, its syntax and its imports.

A block of `text` shows what the block before it prints. Each of its lines must be among the lines that were printed,
whatever the numbers; of a row of a table, the first cell.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from sybil import Example, Sybil
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser, SkipParser

ROOT = Path(__file__).parents[1]


def run_shell(example: Example) -> None:
    """Run a block of shell commands; the first that fails fails the block."""
    command = ["bash", "-euo", "pipefail", "-c", str(example.parsed)]
    example.namespace["printed"] = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, "COLUMNS": "112"}
    ).stdout


def compare_text(example: Example) -> str | None:
    """Find the lines of a block of text that the commands before it did not print; returns them, for the message."""
    printed = set(without_numbers(example.namespace["printed"]))
    missing = [line for line in without_numbers(str(example.parsed)) if line not in printed]
    return f"not printed: {missing}" if missing else None


def without_numbers(text: str) -> list[str]:
    """The lines of a text, of a table's row the first cell, with `#` for each number; lines of a frame are left out."""
    cells = [re.split("[│┃]", line)[1] if line[:1] in "│┃" else line for line in text.splitlines() if line.strip()]
    lines = (re.sub(r"\d[\d.,]*(e[-+]\d+)?", "#", cell.strip()) for cell in cells)
    return [line for line in lines if re.search(r"[\w#]", line)]


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder that the blocks run in."""
    folder = tmp_path_factory.mktemp("docs")
    (folder / "examples").symlink_to(ROOT / "examples")
    before = Path.cwd()
    os.chdir(folder)
    yield folder
    os.chdir(before)


pytest_collect_file = Sybil(
    parsers=[
        CodeBlockParser(language="bash", evaluator=run_shell),
        CodeBlockParser(language="text", evaluator=compare_text),
        PythonCodeBlockParser(),
        SkipParser(),
    ],
    path=str(ROOT),
    patterns=["*.md"],
    fixtures=["workplace"],
).pytest()
