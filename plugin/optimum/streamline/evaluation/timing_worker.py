"""The worker process that opens one model and times it on request. `timing_processes.py` starts it.

It is started as `python -m optimum.streamline.evaluation.timing_worker ARGUMENTS`. ARGUMENTS are the arguments of
`open_runner` as a JSON object. It writes JSON lines to standard output: the first when the model is open, and then one
answer for each request from standard input. It imports only the framework that its runner needs.
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
    """Open the model of the command line, and answer requests until standard input ends."""
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
    """The most memory that this process has held so far, in bytes.

    Args:
        device: `cpu` or `cuda`.
        runtime: The runtime of the model. For torch on a GPU, GPU memory counts, and otherwise RAM.
    """
    if device == "cuda" and runtime == "torch":
        import torch

        return torch.cuda.max_memory_allocated()
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        import resource

        # Only macOS gets here, where ru_maxrss is in bytes.
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # On Linux, ru_maxrss also counts the memory that the parent process held. VmHWM counts only this program's memory.
    # psutil has no such figure on Linux.
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def _claim_stdout() -> TextIO:
    """Reserve standard output for answers, and redirect everything that libraries print there to standard error."""
    claimed = os.dup(1)
    os.dup2(2, 1)
    return os.fdopen(claimed, "w", encoding="utf-8")


def _answer(answers: TextIO, fields: dict[str, Any]) -> None:
    answers.write(json.dumps(fields) + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
