"""What the tests of both packages share."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-pages", action="store_true", help="write what the tests find into the pages in docs/")


@pytest.fixture(scope="session")
def optimum_onnx() -> str:
    """The interpreter of an environment with optimum-onnx and transformers 4; made the first time, for slow tests."""
    script = Path(__file__).parents[1] / "ci" / "peer"
    return subprocess.run(["bash", str(script)], check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
