"""What removing layers and quantizing gain on a GPU, at the shapes of Llama-2-7B and Llama-3-8B with random weights.

    ci/bench gpu                                    # measure every case into docs/gpu.json
    ci/bench gpu --only "llama-3-8b bnb" --out FILE # cases whose name holds that text, into a file of their own
    ci/bench gpu --page                             # measure nothing, write docs/gpu.md
    ci/bench gpu --device cpu --smoke --out FILE    # the same code on a tiny model; its times mean nothing

Cases are bf16, bnb-int8 and bnb-nf4, prefill of 2048 tokens and decode behind them, at batch 1 and 16; decode in bf16
also as a CUDA graph. Behind them, at the shape of Llama-3.2-1B, an export in TensorRT where its library is, in ONNX
Runtime's CUDA provider otherwise. In each the model and the same without its last quarter of layers take turns. Each
model's cases have a process of their own, so that a device that one of them leaves unusable is there again for the
next. A case that fails is a row with its error, and the others go on; the file is written after each. Exit code 1 where
one failed or was left for want of time.
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
# What a case that began in time may take beyond it, and its model's making, before its process is ended.
GRACE_SECONDS = 60.0

Row = dict[str, Any]


def main(argv: list[str] | None = None) -> int:
    """Measure what was asked for; 1 where a case failed or was left, 2 where there was nothing to do."""
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
    parser.add_argument("--out", type=Path, metavar="FILE", help="of the figures, docs/gpu.json unless given")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name holds it; writes no others")
    parser.add_argument("--minutes", type=float, default=8, metavar="N", help="cases left after them are not run")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--smoke", action="store_true", help="a tiny model, to try the script itself")
    parser.add_argument("--page", action="store_true", help="measure nothing, write the page beside the figures")
    args = parser.parse_args(argv)
    if (args.smoke or args.only) and not args.out:
        parser.error("--smoke and --only need --out: docs/gpu.json is of every case")
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
    """Measure the limits, then each case, and write the file after each; `deadline` is by `time.monotonic`."""
    out.parent.mkdir(parents=True, exist_ok=True)
    limits = _attempt(lambda: measure_limits(plan, device))
    release()
    results: dict[str, Any] = {"machine": _machine(device), "plan": asdict(plan), "limits": limits, "rows": []}
    _write(results, out)  # where it cannot be written it is said before the work
    for case, figures in _all_figures(cases, plan, device, deadline):
        row = {"case": case.name, **asdict(case), **figures}
        if "dense" in row and "error" not in limits:
            against_limits(row, case, plan, limits)
        results["rows"].append(row)
        _write(results, out)
        print(case.name, _said(row), flush=True)
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
    """A row a case, measured in a process of their own; where it ends early, the cases left say so."""
    ours, theirs = multiprocessing.Pipe(duplex=False)
    # Spawned, since a CUDA device cannot be used in a process forked from one that has used it.
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
    """A row for each of the cases of one model, which is made once."""
    models = _attempt(partial(_models, cases[0], plan, device))
    for case in cases:
        if "error" in models:
            yield models
        elif time.monotonic() > deadline:
            yield {"not_run": OUT_OF_TIME}
        else:
            yield _attempt(partial(measure, case, models, plan, device))


def _models(case: Case, plan: Plan, device: torch.device) -> Row:
    """The models of a case, in torch or exported."""
    if case.how != EXPORT:
        return build(plan.shapes[case.shape], case.weights, device)
    shape = plan.exported[case.shape]
    return build_exported(build(shape, "bf16", torch.device("cpu")), shape, case.weights, plan, device.type)


def _attempt(measurement: Callable[[], Row]) -> Row:
    """What was measured, or a line of why not: of a long run on a lent machine, one failure must not take the rest."""
    try:
        return measurement()
    except Exception as error:
        cause: BaseException = error
        while cause.__context__ is not None:  # what ends a capture hides what went wrong in it
            cause = cause.__context__
        first = (str(cause).strip() or "no message").splitlines()[0]
        return {"error": f"{type(cause).__name__}: {first}"}


def _said(row: Row) -> str:
    if "dense" not in row:
        return str(row.get("error") or f"not run: {row['not_run']}")
    dense, pruned = (row[layers]["ms"][1] for layers in ("dense", "pruned"))
    return f"dense {dense:.3f} ms, pruned {pruned:.3f} ms, {row['dense_over_pruned'][1]:.3f} times faster"


def _write(results: dict[str, Any], out: Path) -> None:
    """Beside, and then in its place: what stops the run leaves a whole file."""
    beside = out.with_name(out.name + ".new")
    beside.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    os.replace(beside, out)


def _machine(device: torch.device) -> dict[str, Any]:
    facts: dict[str, Any] = {**describe_machine(device.type), "date": datetime.now(UTC).date().isoformat()}
    with contextlib.suppress(PackageNotFoundError):  # its cases say so
        facts["bitsandbytes"] = version("bitsandbytes")
    if device.type == "cuda":
        facts |= {"gpu_bytes": torch.cuda.get_device_properties(0).total_memory, "cuda": torch.version.cuda}
        facts |= _driver()
    return facts


def _driver() -> dict[str, str]:
    """The driver's version where its own tool can say."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return {}
    return {"driver": told[0]} if told else {}


if __name__ == "__main__":
    sys.exit(main())
