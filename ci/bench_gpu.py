"""Measure the gain of pruning and of quantizing on a GPU, with random models of Llama-2-7B's and Llama-3-8B's shape.

    ci/bench gpu                                    # measure every case into docs/gpu.json
    ci/bench gpu --only "llama-3-8b bnb" --out FILE # measure the cases whose name contains the text, into another file
    ci/bench gpu --page                             # write docs/gpu.md; measure nothing
    ci/bench gpu --device cpu --smoke --out FILE    # run the same code on a tiny model; its times mean nothing

The cases are bf16, bnb-int8 and bnb-nf4; prefill of 2048 tokens, and decode after it; batch 1 and 16; and decode in
bf16 also as a CUDA graph. Then come exports of a Llama-3.2-1B shape, in TensorRT if its library is installed, otherwise
in ONNX Runtime's CUDA provider. In each case the dense model and the same model without its last quarter of layers take
turns. The cases of one model run in their own process, so a case that leaves the device unusable does not affect the
next model. A failed case is a row with its error, and the others go on. The file is written after each case. The exit
code is 1 if a case failed, or did not run because the time was over.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import groupby
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from gpu_cases import EXPORT, FULL, SMOKE, Case, Plan, make_cases
from gpu_measure import against_limits, measure, measure_limits
from gpu_models import build, release
from gpu_page import write_page
from gpu_runtimes import build_exported, runtime_here
from optimum.streamline.system.environment import describe_machine

RESULTS = Path(__file__).parents[1] / "docs" / "gpu.json"
NO_CUDA = "bench gpu: no CUDA device here; --device cpu --smoke tries the script on a tiny model"
OUT_OF_TIME = "the time given was over"
# A case that started before the deadline may go on for this long after it; then its process is ended.
GRACE_SECONDS = 60.0

Row = dict[str, Any]


def main(argv: list[str] | None = None) -> int:
    """Measure the cases of the command line.

    Returns:
        The exit code: 0 for success, 1 if a case failed or did not run, 2 if nothing could be measured.
    """
    begun = time.monotonic()
    args = _parse(argv)
    if args.page:
        return _page(args.out or RESULTS)
    if (args.device == "cuda" and not torch.cuda.is_available()) or (args.device == "cpu" and not args.smoke):
        return _refuse(NO_CUDA)
    plan = SMOKE if args.smoke else FULL
    every = make_cases(plan, args.device, runtime_here(args.device))
    cases = [case for case in every if args.only in case.name]
    if not cases:
        return _refuse(f"bench gpu: no case's name holds {args.only!r}; one of them is: {every[0].name}")
    return run(cases, plan, torch.device(args.device), args.out or RESULTS, begun + 60 * args.minutes)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, metavar="FILE", help="the file of figures; by default docs/gpu.json")
    parser.add_argument("--only", default="", metavar="TEXT", help="measure the cases whose name contains it")
    parser.add_argument("--minutes", type=float, default=8, metavar="N", help="start no case after so many minutes")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--smoke", action="store_true", help="a tiny model, to try the script itself")
    parser.add_argument("--page", action="store_true", help="write the page beside the figures; measure nothing")
    args = parser.parse_args(argv)
    if (args.smoke or args.only) and not args.out:
        parser.error("--smoke and --only need --out: docs/gpu.json is for all cases")
    return args


def _page(results: Path) -> int:
    if not results.is_file():
        return _refuse(f"bench gpu: no figures in {results}; measure on a CUDA machine first")
    write_page(results)
    return 0


def _refuse(why: str) -> int:
    print(why, file=sys.stderr)
    return 2


def run(cases: list[Case], plan: Plan, device: torch.device, out: Path, deadline: float) -> int:
    """Measure the machine's limits and then each case; the file is written after each.

    Args:
        cases: The cases, in the order of measurement.
        plan: The sizes and numbers of rounds.
        device: The device.
        out: The JSON file to write.
        deadline: The time after which no case starts, by `time.monotonic`, in seconds.

    Returns:
        The exit code: 1 if a case failed or did not run, otherwise 0.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    limits = _attempt(lambda: measure_limits(plan, device))
    release()
    results: dict[str, Any] = {"machine": _machine(device), "plan": asdict(plan), "limits": limits, "rows": []}
    _write(results, out)  # so that a file that cannot be written is reported before the work
    for case, figures in _all_figures(cases, plan, device, deadline):
        row = {"case": case.name, **asdict(case), **figures}
        if "dense" in row and "error" not in limits:
            against_limits(row, case, plan, limits)
        results["rows"].append(row)
        _write(results, out)
        print(case.name, _summary(row), flush=True)
    return int(any("error" in part or "not_run" in part for part in (limits, *results["rows"])))


def _all_figures(cases: list[Case], plan: Plan, device: torch.device, deadline: float) -> Iterator[tuple[Case, Row]]:
    for _, of_model in groupby(cases, key=lambda case: case.model):
        same = list(of_model)
        if time.monotonic() > deadline:
            figures = iter([{"not_run": OUT_OF_TIME}] * len(same))
        else:
            figures = measured_apart(same, plan, device, deadline)
        yield from zip(same, figures, strict=True)


def measured_apart(cases: list[Case], plan: Plan, device: torch.device, deadline: float) -> Iterator[Row]:
    """Measure the cases of one model in a new process; yields a row per case.

    If the process ends early, the rows of the remaining cases have an error.
    """
    ours, theirs = multiprocessing.Pipe(duplex=False)
    # Spawned and not forked: a forked process cannot use CUDA if its parent has used it.
    process = multiprocessing.get_context("spawn").Process(
        target=_send_all, args=(cases, plan, device, deadline, theirs)
    )
    process.start()
    theirs.close()
    left, why = len(cases), ""
    try:
        while left and not why:
            if ours.poll(max(0.0, deadline - time.monotonic()) + GRACE_SECONDS):
                yield ours.recv()
                left -= 1
            else:
                why = "no answer in time"
    except EOFError:
        process.join()
        why = f"its process ended with exit code {process.exitcode}"
    finally:
        process.kill()
        process.join()
    yield from [{"error": why}] * left


def _send_all(cases: list[Case], plan: Plan, device: torch.device, deadline: float, answers: Connection) -> None:
    for row in measured_here(cases, plan, device, deadline):
        answers.send(row)


def measured_here(cases: list[Case], plan: Plan, device: torch.device, deadline: float) -> Iterator[Row]:
    """Measure the cases of one model in this process; the model is made once. Yields a row per case."""
    models = _attempt(partial(_models, cases[0], plan, device))
    for case in cases:
        if "error" in models:
            yield models
        elif time.monotonic() > deadline:
            yield {"not_run": OUT_OF_TIME}
        else:
            yield _attempt(partial(measure, case, models, plan, device))


def _models(case: Case, plan: Plan, device: torch.device) -> Row:
    """The models `dense` and `pruned` of a case, in torch or exported."""
    if case.runtime != EXPORT:
        return build(plan.shapes[case.shape], case.weights, device)
    shape = plan.exported[case.shape]
    return build_exported(build(shape, "bf16", torch.device("cpu")), shape, case.weights, plan, device.type)


def _attempt(measurement: Callable[[], Row]) -> Row:
    """The result of a measurement, or its error in one line: one failure must not end a long run on a lent machine."""
    try:
        return measurement()
    except Exception as error:
        cause: BaseException = error
        while cause.__context__ is not None:  # an error at the end of a capture hides the error within it
            cause = cause.__context__
        first = (str(cause).strip() or "no message").splitlines()[0]
        return {"error": f"{type(cause).__name__}: {first}"}


def _summary(row: Row) -> str:
    if "dense" not in row:
        return str(row.get("error") or f"not run: {row['not_run']}")
    dense, pruned = (row[layers]["ms"][1] for layers in ("dense", "pruned"))
    return f"dense {dense:.3f} ms, pruned {pruned:.3f} ms, {row['dense_over_pruned'][1]:.3f} times faster"


def _write(results: dict[str, Any], out: Path) -> None:
    """Write the file under a temporary name and rename it, so that an interrupted run leaves a complete file."""
    beside = out.with_name(out.name + ".new")
    beside.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    os.replace(beside, out)


def _machine(device: torch.device) -> dict[str, Any]:
    facts: dict[str, Any] = {**describe_machine(device.type), "date": datetime.now(UTC).date().isoformat()}
    with contextlib.suppress(PackageNotFoundError):  # then the cases that need it have an error
        facts["bitsandbytes"] = version("bitsandbytes")
    if device.type == "cuda":
        facts |= {"gpu_bytes": torch.cuda.get_device_properties(0).total_memory, "cuda": torch.version.cuda}
        facts |= _driver()
    return facts


def _driver() -> dict[str, str]:
    """The driver's version; empty if `nvidia-smi` cannot tell."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        versions = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return {}
    return {"driver": versions[0]} if versions else {}


if __name__ == "__main__":
    sys.exit(main())
