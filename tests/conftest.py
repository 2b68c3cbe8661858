"""What the tests of both packages share."""

from __future__ import annotations

import gc
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from timer import Timer


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-pages", action="store_true", help="write what the tests find into the pages in docs/")


def pytest_collection_finish() -> None:
    leave_out_of_garbage_collection()


def leave_out_of_garbage_collection() -> None:
    """Leave what was imported out of every later search for garbage: it stays, and there are a million objects."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000)  # a trace makes so many objects that a tenth of its time is such searches


@pytest.fixture(scope="session", autouse=True)
def fewer_searches_for_garbage() -> Iterator[None]:
    """Accelerate searches for garbage at the start of each training, which takes longer than a tiny model trains."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("accelerate.utils.memory.gc", SimpleNamespace(collect=lambda: 0))
        yield


@pytest.fixture(scope="session")
def optimum_onnx() -> str:
    """The interpreter of an environment with optimum-onnx and transformers 4; made the first time, for slow tests."""
    script = Path(__file__).parents[1] / "ci" / "peer"
    return subprocess.run(["bash", str(script)], check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


@pytest.fixture
def untimed(monkeypatch: pytest.MonkeyPatch) -> Timer:
    """Starts no processes to time models in, for tests of the other figures of a report; returns the stand-in."""
    from optimum.streamline.evaluation import validate

    timer = Timer()
    monkeypatch.setattr(validate, "time_alternating", timer)
    return timer


@pytest.fixture
def measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dry run measures nothing several times, which only makes times more exact."""
    from optimum.streamline.costs import speed

    monkeypatch.setattr(speed, "LONG", 0)
    monkeypatch.setattr(speed, "IMPORTS", 0)


@pytest.fixture(scope="session", autouse=True)
def kept_traces(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Equal models are traced once, whichever test and process asks first."""
    try:
        import optimum.exporters.streamline.tracing.build as build
        from traces import keeping, read_operators_once
    except ImportError:  # of an environment without the extra `onnx`
        yield
        return
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "traces"
    folder.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "trace", keeping(build.trace, folder))
        read_operators_once(patch)
        leave_out_of_garbage_collection()
        yield
