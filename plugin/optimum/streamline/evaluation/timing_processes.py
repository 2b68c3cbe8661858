"""The parent's side of `timing_worker.py`: one process a model, asked in turn.

Knows processes and the lines they speak; nothing of models, nor of what the times mean. The workers of multiprocessing
and concurrent.futures begin with the parent's memory, or its main module, which would count in what is measured.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from optimum.streamline.errors import StreamlineError, WorkerError
from optimum.streamline.runtime.runner import TokenIds
from optimum.streamline.system.progress import progress_bar

from .latency import Round, Timing, alternate

# The threads of ONNX Runtime and OpenMP spin for some 5 to 30 ms after their work before they sleep.
QUIET_SECONDS = 0.05


@dataclass(frozen=True)
class Job:
    """What a worker opens: the arguments of `open_runner`, and what messages call it."""

    label: str
    path: str
    dtype: str = "fp32"
    device: str = "cpu"
    trust_remote_code: bool = False

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments for `open_runner`."""
        return {name: value for name, value in asdict(self).items() if name != "label"}


@dataclass(frozen=True)
class Timed:
    """What one worker measured.

    Args:
        timing: Its rounds.
        peak_bytes: Most memory its process held, loading included.
    """

    timing: Timing
    peak_bytes: int


class Worker:
    """A process that holds one model. Use as a context manager: leaving ends the process.

    Args:
        job: What it opens.
        log: File to append to what its libraries say; dropped by default.
    """

    def __init__(self, job: Job, log: Path | None = None) -> None:
        self.job = job
        self.peak_bytes = 0
        self._log = log
        self._chatter = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the worker
        self._process = subprocess.Popen(
            # -P: a file of the working folder must not stand in for a module of the same name.
            [sys.executable, "-P", "-m", "optimum.streamline.evaluation.timing_worker", json.dumps(job.arguments())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._chatter,
            text=True,
            encoding="utf-8",
        )

    @property
    def pid(self) -> int:
        """The process."""
        return self._process.pid

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        # Killed, not asked: it has nothing to save, and may be in the middle of a round when another one died.
        self._process.kill()
        self._process.communicate()
        if self._log is not None:
            with self._log.open("ab") as log:
                log.write(self._said())
        self._chatter.close()

    def wait_ready(self) -> str:
        """Wait until the model is open; returns its runtime.

        Raises:
            StreamlineError: it cannot be opened.
            WorkerError: the worker died.
        """
        return str(self._read()["runtime"])

    def time_round(self, tokens: TokenIds, prompt_length: int) -> Round:
        """`latency.time_round` in the worker.

        Raises:
            WorkerError: the worker died.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"tokens": tokens[0].tolist(), "prompt_length": prompt_length}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._death() from None
        answer = self._read()
        self.peak_bytes = int(answer["peak_bytes"])
        return Round(answer["prefill_ms"], answer["decode_ms"])

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._death()
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise StreamlineError(answer["error"])
        return answer

    def _death(self) -> WorkerError:
        code = self._process.wait()
        lines = self._said().decode(errors="replace").strip().splitlines()
        reason = lines[-1] if lines else "it said nothing"
        return WorkerError(f"{self.job.label}: the process that timed it ended with code {code} ({reason})")

    def _said(self) -> bytes:
        self._chatter.seek(0)
        return self._chatter.read()


def time_alternating(
    jobs: Sequence[Job], tokens: TokenIds, prompt_length: int, rounds: int, warmup: int, log: Path | None = None
) -> list[Timed]:
    """Time every job in a process of its own, all on the same tokens, in alternating rounds.

    Args:
        tokens: `[1, length]`, the prompt first; the rest is decoded one by one.
        warmup: Rounds to run first and forget.
        log: File to append to what the workers' libraries say.

    Raises:
        StreamlineError: a worker cannot open its model.
        WorkerError: a worker died.
    """
    with ExitStack() as stack:
        workers = [stack.enter_context(Worker(job, log)) for job in jobs]
        for worker in workers:
            worker.wait_ready()
        timers = [partial(_time_in_quiet, worker, tokens, prompt_length) for worker in workers]
        with progress_bar("measuring latency", warmup + rounds) as bar:
            timings = alternate(timers, rounds, warmup, bar.advance)
        return [Timed(timing, worker.peak_bytes) for timing, worker in zip(timings, workers, strict=True)]


def _time_in_quiet(worker: Worker, tokens: TokenIds, prompt_length: int) -> Round:
    time.sleep(QUIET_SECONDS)
    return worker.time_round(tokens, prompt_length)
