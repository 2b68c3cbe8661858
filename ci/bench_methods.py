"""Compare all pruning methods on small trained models: perplexity ratio, parameters, seconds and peak memory.

    ci/bench methods                                  # measure every row that is missing, then write the page
    ci/bench methods --part healed --only 'sleb*'     # measure some of the rows; `--model qwen3` too
    ci/bench methods --page                           # drop obsolete rows and write the page; measure nothing

`docs/methods.json` keeps the measured rows. A row is measured again only with `--again`. Several runs may measure at
the same time: each takes the next row that no other has begun. Methods calibrate on `stdlib:calibration`, healing uses
other windows of it, and every row is evaluated on the same windows of `stdlib:eval`. No model was trained on any of
these. A row calls the same functions as `optimum-cli streamline prune`. `methods_cases.py` defines the rows;
`methods_page.py` writes the page.
"""

from __future__ import annotations

import argparse
import ctypes
import fcntl
import gc
import json
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from methods_cases import EVALUATION, LENGTH, MODELS, Case, Part, Row, cases
from methods_page import write_page
from optimum.streamline.checkpoints.loading import load_stock, load_tokenizer, read_config
from optimum.streamline.editing.apply import apply_plan
from optimum.streamline.editing.plan import Plan
from optimum.streamline.evaluation.intervals import Samples, mean_interval
from optimum.streamline.model_files.source import ModelSource
from optimum.streamline.models.architectures import architecture_of
from optimum.streamline.models.offloaded_weights import copy_in_memory
from optimum.streamline.models.skipped_sublayers import drop_skipped_sublayers
from optimum.streamline.pipeline.prune import change, prepare, sample_heal_text
from optimum.streamline.recipe.parsing import make_recipe
from optimum.streamline.system.atomic_output import write_file
from optimum.streamline.system.environment import describe_machine
from optimum.streamline.text.windows import Windows, read_windows

RESULTS = Path("docs/methods.json")
LOCK = Path(".cache/methods.lock")
BATCH = 8


def main() -> None:
    """Read the command line, measure the missing rows, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", choices=list(MODELS), action="append", help="measure this model only; repeatable")
    parser.add_argument(
        "--part",
        choices=get_args(Part),
        action="append",
        help="measure this part only; repeatable",
    )
    parser.add_argument("--only", default="*", help="measure the rows whose name matches this pattern")
    parser.add_argument("--again", action="store_true", help="measure rows again that were measured before")
    parser.add_argument("--page", action="store_true", help="drop obsolete rows and write the page; measure nothing")
    args = parser.parse_args()
    wanted = [
        case
        for case in cases()
        if (not args.model or case.model in args.model)
        and (not args.part or case.part in args.part)
        and fnmatch(case.name, args.only)
    ]
    if not args.page:
        measure_missing(wanted, args.again)
    with locked():
        done = read_rows()
        known = [done[case.key] for case in cases() if case.key in done]
        if args.page:
            write_rows(known)
        write_page(known)


def read_rows() -> dict[str, Row]:
    """The measured rows, by the key of their case; a changed case has another key."""
    if not RESULTS.is_file():
        return {}
    return {fields["key"]: Row(**fields) for fields in json.loads(RESULTS.read_text(encoding="utf-8"))["rows"]}


def measure_missing(wanted: Sequence[Case], again: bool) -> None:
    """Measure the cases that have no row, or with `again` all; each row is written as soon as it is measured."""
    for number, case in enumerate(wanted, start=1):
        with begun(case) as mine:
            if not mine or (case.key in read_rows() and not again):
                continue
            row = measure(case)
            keep(row)
        print(
            f"{number}/{len(wanted)} {case.model} {case.removed} {case.part} {case.name}: ratio "
            "{:.4f} ({:.4f} to {:.4f}),".format(*row.ratio),
            f"{row.seconds:.0f} s, {row.peak_mib:.0f} MiB",
            flush=True,
        )


@contextmanager
def begun(case: Case) -> Iterator[bool]:
    """Hold the lock of a case, and say whether it is ours; another run that measures it holds the lock."""
    file = LOCK.parent / "methods" / case.key.replace("/", " ")
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


@contextmanager
def locked() -> Iterator[None]:
    """Hold the lock on the results and the page, so that other runs wait."""
    LOCK.parent.mkdir(exist_ok=True)
    with LOCK.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def keep(row: Row) -> None:
    """Add a row to the results, which other processes may have changed meanwhile."""
    with locked():
        write_rows({**read_rows(), row.key: row}.values())


def write_rows(rows: Iterable[Row]) -> None:
    """Write these rows, and no others, as the results."""
    fields = {"machine": describe_machine("cpu"), "rows": [asdict(row) for row in rows]}
    write_file(RESULTS, json.dumps(fields, indent=1) + "\n")


def measure(case: Case) -> Row:
    """Measure one row: choose layers, edit and heal as the command does, then evaluate."""
    torch.manual_seed(0)
    dense = dense_losses(case.model)
    reset_peak()
    start = time.monotonic()
    model, layers = make(case)
    seconds, peak = time.monotonic() - start, peak_mib()
    windows = evaluation_windows(case.model)
    measured = [losses(model, windows)]
    for removed in case.draws()[1:] if case.random else ():
        measured.append(losses(without(case.model, removed), windows))
    counts = np.full(len(dense), LENGTH - 1, np.float64)
    if case.random:
        ratios = [math.exp(float((loss - dense).sum()) / counts.sum()) for loss in measured]
        perplexities = [math.exp(float(loss.sum()) / counts.sum()) for loss in measured]
        ratio = (float(np.mean(ratios)), min(ratios), max(ratios))
        perplexity = (float(np.mean(perplexities)), min(perplexities), max(perplexities))
    else:
        over_dense = mean_interval(measured[0] - dense, counts, 0).map(np.exp)
        level = mean_interval(measured[0], counts, 0).map(np.exp)
        ratio = (over_dense.value, over_dense.low, over_dense.high)
        perplexity = (level.value, level.low, level.high)
    return Row(
        key=case.key,
        model=case.model,
        part=case.part,
        removed=case.removed,
        name=case.name,
        layers=layers,
        perplexity=perplexity,
        ratio=ratio,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        seconds=seconds,
        peak_mib=peak,
    )


def make(case: Case) -> tuple[PreTrainedModel, str]:
    """The model of a case without its skipped sublayers, and the edit in words; for random draws the first one's."""
    if not case.removed:
        return load_stock(source_of(case.model), torch.float32), ""
    if case.random:
        return without(case.model, case.draws()[0]), ""
    prepared = prepare(source_of(case.model), make_recipe(case.fields, case.name), print_nothing)
    sample_heal_text(prepared, print_nothing, judged_on=evaluation_windows(case.model))
    change(prepared, print_nothing)
    model: Any = prepared.model
    if prepared.on_disk is not None:  # which is deleted with `prepared`
        model = copy_in_memory(model)
    model = drop_skipped_sublayers(model, architecture_of(model.config))
    return model, prepared.plan.describe().rpartition(":")[0]


def without(name: str, removed: tuple[int, ...]) -> PreTrainedModel:
    """The named model without the layers `removed`."""
    model = load_stock(source_of(name), torch.float32)
    apply_plan(model, Plan(model.config.num_hidden_layers, removed), None)
    return model


def source_of(name: str) -> ModelSource:
    """The model's folder."""
    return ModelSource(str(MODELS[name]))


@cache
def evaluation_windows(name: str) -> Windows:
    """The evaluation windows of every row of a model."""
    source = source_of(name)
    vocabulary = read_config(source).vocab_size
    return read_windows("stdlib:eval", load_tokenizer(source), EVALUATION, LENGTH, 0, vocabulary)


@cache
def dense_losses(name: str) -> Samples:
    """The losses of the dense model, with which every row is compared."""
    return losses(load_stock(source_of(name), torch.float32), evaluation_windows(name))


@torch.inference_mode()
def losses(model: PreTrainedModel, windows: Windows) -> Samples:
    """The sum of the next-token losses over each window, in nats, `[windows]`."""
    sums = []
    for start in range(0, len(windows.ids), BATCH):
        rows = windows.ids[start : start + BATCH]
        logits = model(rows, use_cache=False).logits[:, :-1].float()
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="none")
        sums.append(loss.view(len(rows), -1).double().sum(1))
    return torch.cat(sums).numpy()


def reset_peak() -> None:
    """Free the memory of earlier rows, and restart the measurement of peak memory (Linux only)."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def peak_mib() -> float:
    """The largest resident memory of this process since `reset_peak`, in MiB."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def print_nothing(message: str) -> None:
    """Ignore a progress message: this benchmark prints its rows only."""


if __name__ == "__main__":
    main()
