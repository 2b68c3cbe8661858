"""The process that holds one model and times it on request; `timing_processes.py` starts it and sends the requests.

Started as `python -m optimum.streamline.evaluation.timing_worker ARGUMENTS`, where ARGUMENTS are the arguments of
`open_runner` as one JSON object. It writes JSON lines: the first says that the model is open, each further one answers
one request from standard input. It imports no framework but the one its runner needs.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from optimum.streamline.errors import StreamlineError
from optimum.streamline.runtime.opening import open_runner

from .latency import time_round


def main() -> None:
    """Open the model named on the command line and answer requests."""
    answers = _claim_stdout()
    arguments = json.loads(sys.argv[1])
    try:
        runner = open_runner(**arguments)
    except StreamlineError as error:
        _answer(answers, {"error": str(error)})
        return
    _answer(answers, {"runtime": runner.runtime})
    for line in sys.stdin:
        request = json.loads(line)
        timing = time_round(runner, np.array([request["tokens"]], np.int64), request["prompt_length"])
        peak = peak_memory(arguments["device"], runner.runtime)
        _answer(answers, {"prefill_ms": timing.prefill_ms, "decode_ms": timing.decode_ms, "peak_bytes": peak})


def peak_memory(device: str, runtime: str) -> int:
    """Most bytes held at once so far: of the GPU where torch computes there, else of this process's RAM."""
    if device == "cuda" and runtime == "torch":
        import torch

        return torch.cuda.max_memory_allocated()
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        import resource

        # Bytes on macOS, where alone this is reached.
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # psutil has no such figure on Linux. The system hands ru_maxrss down from the parent, which may have held far more
    # than this process ever does; the high-water mark starts anew with the program.
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def _claim_stdout() -> TextIO:
    """Standard output for answers alone: whatever else any library prints there goes to standard error."""
    claimed = os.dup(1)
    os.dup2(2, 1)
    return os.fdopen(claimed, "w", encoding="utf-8")


def _answer(answers: TextIO, fields: dict[str, Any]) -> None:
    answers.write(json.dumps(fields) + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
