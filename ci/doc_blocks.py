"""A pytest plugin that runs the code blocks of Markdown pages: `pytest -p doc_blocks docs/tutorial.md`.

Blocks of `python` and of `bash` run in the order they stand in, all pages in one empty folder that holds `examples`:
a page can use what an earlier page made. `<!-- skip: next "needs a GPU" -->` before a block keeps it from running, and
says why; `tests/test_docs.py` then still checks its flags, its syntax and its imports.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from sybil import Example, Sybil
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser, SkipParser

ROOT = Path(__file__).parents[1]


def run_shell(example: Example) -> None:
    """Run a block of shell commands; the first that fails fails the block."""
    subprocess.run(["bash", "-euo", "pipefail", "-c", str(example.parsed)], check=True)


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
    parsers=[CodeBlockParser(language="bash", evaluator=run_shell), PythonCodeBlockParser(), SkipParser()],
    path=str(ROOT),
    patterns=["*.md"],
    fixtures=["workplace"],
).pytest()
