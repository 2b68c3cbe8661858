"""Timing models in worker processes: one for each model (`timing_worker.py`), which run rounds in turn.

Workers of multiprocessing start with the memory or the main module of the parent, which would count in the peak memory.
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

# The pause before each round, in seconds. Threads of ONNX Runtime and OpenMP use the CPU for another 5 to 30 ms after
# their work.
QUIET_SECONDS = 0.05


@dataclass(frozen=True)
class Job:
    """A model for a worker to open: its name in messages, and the arguments of `open_runner`."""

    label: str
    path: str
    dtype: str = "fp32"
    device: str = "cpu"
    trust_remote_code: bool = False

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments for `open_runner`."""
        return {name: value for name, value in asdict(self).items() if name != "label"}


@dataclass(frozen=True)
class WorkerResult:
    """The results of one worker.

    Args:
        timing: The times of its rounds.
        peak_bytes: The most memory that its process held, with loading, in bytes.
    """

    timing: Timing
    peak_bytes: int


class Worker:
    """A process that holds one model. Use it as a context manager, which ends the process.

    Args:
        job: The model to open.
        log: A file to append the output of its libraries to; by default that output is dropped.
    """

    def __init__(self, job: Job, log: Path | None = None) -> None:
        self.job = job
        self.peak_bytes = 0
        self._log = log
        self._library_output = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the worker
        self._process = subprocess.Popen(
            # -P: do not import modules from the working folder.
            [sys.executable, "-P", "-m", "optimum.streamline.evaluation.timing_worker", json.dumps(job.arguments())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._library_output,
            text=True,
            encoding="utf-8",
        )

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        # Killed, because it has nothing to save, and may be in the middle of a round if another worker died.
        self._process.kill()
        self._process.communicate()
        if self._log is not None:
            with self._log.open("ab") as log:
                log.write(self._read_library_output())
        self._library_output.close()

    def wait_ready(self) -> str:
        """Wait until the model is open.

        Returns:
            The name of its runtime.

        Raises:
            StreamlineError: the model cannot be opened.
            WorkerError: the worker died.
        """
        return str(self._read()["runtime"])

    def time_round(self, tokens: TokenIds, prompt_length: int) -> Round:
        """Run `latency.time_round` in the worker.

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
        lines = self._read_library_output().decode(errors="replace").strip().splitlines()
        reason = lines[-1] if lines else "without any output"
        return WorkerError(f"{self.job.label}: the process that timed it ended with code {code} ({reason})")

    def _read_library_output(self) -> bytes:
        self._library_output.seek(0)
        return self._library_output.read()


def time_alternating(
    jobs: Sequence[Job], tokens: TokenIds, prompt_length: int, rounds: int, warmup: int, log: Path | None = None
) -> list[WorkerResult]:
    """Time every model in its own process, on the same tokens, in alternating rounds (`latency.alternate`).

    Args:
        jobs: The models.
        tokens: Token ids `[1, length]`: the prompt, then the tokens to decode one by one.
        prompt_length: The length of the prompt.
        rounds: The number of rounds to keep.
        warmup: The number of rounds to run first and drop.
        log: A file to append the output of the workers' libraries to.

    Returns:
        One result for each model.

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
        return [WorkerResult(timing, worker.peak_bytes) for timing, worker in zip(timings, workers, strict=True)]


def _time_in_quiet(worker: Worker, tokens: TokenIds, prompt_length: int) -> Round:
    time.sleep(QUIET_SECONDS)
    return worker.time_round(tokens, prompt_length)
