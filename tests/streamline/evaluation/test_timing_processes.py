"""Timing workers in real processes: their answers, and the error when one dies."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from optimum.streamline.errors import StreamlineError, WorkerError
from optimum.streamline.evaluation.timing_processes import Job, Worker, time_alternating
from optimum.streamline.runtime.opening import open_runner
from tiny import tiny_model, token_ids

TOKENS = token_ids(1, 14).numpy()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tiny")
    tiny_model().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def quick(checkpoint: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What a worker opens at once, for it needs no torch: a graph; without the extra `onnx`, the checkpoint."""
    try:
        from optimum.exporters.streamline import export_checkpoint

        return export_checkpoint(checkpoint, tmp_path_factory.mktemp("graph") / "onnx").path
    except StreamlineError:
        return checkpoint


def test_every_model_is_timed_in_every_round(quick: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    results = time_alternating([Job("a", quick), Job("b", quick)], TOKENS, 10, rounds=3, warmup=1, log=log)
    assert len(results) == 2
    for result in results:
        assert len(result.timing.prefill_ms) == len(result.timing.decode_ms) == 3
        assert min(*result.timing.prefill_ms, *result.timing.decode_ms) > 0
        assert result.peak_bytes > 50e6  # Python and ONNX Runtime alone are more
    assert log.is_file()


def test_peak_memory_is_not_the_parents(quick: str) -> None:
    burden = np.ones(1 << 28)  # 2 GiB that the worker never holds
    (result,) = time_alternating([Job("a", quick)], TOKENS, 10, rounds=1, warmup=0)
    assert result.peak_bytes < burden.nbytes / 2


def test_chatter_on_stdout_does_not_reach_the_answers(quick: str, tmp_path: Path) -> None:
    # Whatever a worker imports may print, to Python's stream or to the file descriptor.
    (tmp_path / "sitecustomize.py").write_text(
        "import os, numpy\n"
        "real = numpy.array\n"
        "def array(*a, **k):\n"
        "    print('chatter in Python', flush=True)\n"
        "    os.write(1, b'chatter below Python\\n')\n"
        "    return real(*a, **k)\n"
        "numpy.array = array\n"
    )
    process = subprocess.run(
        [
            sys.executable,
            "-m",
            "optimum.streamline.evaluation.timing_worker",
            json.dumps(Job("a", quick).arguments()),
        ],
        input=json.dumps({"tokens": TOKENS[0].tolist(), "prompt_length": 10}) + "\n",
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        check=True,
    )
    ready, answer = (json.loads(line) for line in process.stdout.splitlines())
    assert ready == {"runtime": open_runner(quick).runtime}
    assert set(answer) == {"prefill_ms", "decode_ms", "peak_bytes"}
    assert "chatter in Python" in process.stderr
    assert "chatter below Python" in process.stderr


def test_a_model_that_cannot_be_opened_is_the_same_error_as_here(quick: str, tmp_path: Path) -> None:
    broken = shutil.copytree(quick, tmp_path / "broken")
    (broken / "config.json").unlink()
    (broken / "model.onnx").unlink(missing_ok=True)
    with pytest.raises(StreamlineError) as here:
        open_runner(str(broken))
    with pytest.raises(StreamlineError) as there, Worker(Job("broken", str(broken))) as worker:
        worker.wait_ready()
    assert str(there.value) == str(here.value)
    assert there.value.exit_code == 2


def test_a_worker_that_crashes_says_its_last_words(checkpoint: str) -> None:
    outside = np.full((1, 14), 10**6)  # an index error in the embedding
    with Worker(Job("candidate", checkpoint)) as worker:
        assert worker.wait_ready() == "torch"
        with pytest.raises(WorkerError, match=r"candidate: .* ended with code 1 \(IndexError: index out of range"):
            worker.time_round(outside, 10)
        with pytest.raises(WorkerError, match="ended with code 1") as caught:
            worker.time_round(TOKENS, 10)
    assert caught.value.exit_code == 1  # not 2: what it was given is not to blame


def test_a_worker_that_is_killed_is_told_from_one_that_hangs(quick: str) -> None:
    with Worker(Job("candidate", quick)) as worker:
        worker.wait_ready()
        os.kill(worker.pid, signal.SIGKILL)
        with pytest.raises(WorkerError, match="ended with code -9"):
            worker.time_round(TOKENS, 10)


def test_leaving_ends_the_process(quick: str) -> None:
    with Worker(Job("a", quick)) as worker:
        worker.wait_ready()
    with pytest.raises(ProcessLookupError):
        os.kill(worker.pid, 0)


def test_worker_code_imports_no_framework() -> None:
    module = "optimum.streamline.evaluation.timing_worker"
    code = f"import sys, {module}; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
