"""Every method on the reference model: perplexity with its interval, parameters and seconds, in docs/methods.md.

    ci/bench methods

Choices are made on `stdlib:calibration`, replacements trained on `stdlib:train`, and everything is judged on
`stdlib:eval`, all models on the same windows. The dense model is a row of its own, and random removal is measured
as often as it takes to know its spread: a method that does not beat chance is no method.
"""

from __future__ import annotations

import copy
import json
import random
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from optimum.streamline.accuracy import Accuracy, measure_accuracy
from optimum.streamline.anatomy import architecture_of
from optimum.streamline.checkpoint import Source, load_stock, load_tokenizer
from optimum.streamline.dead import drop_dead_sublayers
from optimum.streamline.edit import apply_plan, build_replacement
from optimum.streamline.heal import HealSettings, default_lr, heal_windows, train_replacement
from optimum.streamline.machine import describe_machine
from optimum.streamline.methods import method_of
from optimum.streamline.plan import Plan
from optimum.streamline.recipe import Recipe, make_recipe
from optimum.streamline.scores import Scores, measure_scores
from optimum.streamline.torch_runner import TorchRunner
from optimum.streamline.windows import Windows, read_windows

MODEL = "examples/reference_model"
REMOVED = (2, 4, 6, 8)
DRAWS = 20
LENGTH, CALIBRATION, EVALUATION = 256, 64, 128
HEAL_TOKENS = 200_000
DOCUMENT = Path("docs/methods.md")
START, END = "<!-- table: written by ci/bench methods -->", "<!-- end of table -->"


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    removed: int
    name: str
    layers: str
    perplexity: tuple[float, float, float]
    ratio: tuple[float, float, float]
    parameters: int
    seconds: float


@dataclass(frozen=True)
class Bench:
    """What every row is made from."""

    model: PreTrainedModel
    scores: Scores
    score_seconds: float
    evaluation: Windows
    heal: Windows
    dense: Accuracy


def main() -> None:
    """Measure all rows, and write them into the document and beside it as JSON."""
    bench = set_up()
    rows = list(measure(bench))
    fields = {"machine": describe_machine("cpu"), "rows": [asdict(row) for row in rows]}
    DOCUMENT.with_suffix(".json").write_text(json.dumps(fields, indent=1) + "\n")
    before, _, rest = DOCUMENT.read_text().partition(START)
    DOCUMENT.write_text(f"{before}{START}\n\n{table(rows)}\n{END}{rest.partition(END)[2]}")
    print(table(rows))


def set_up() -> Bench:
    """Load the model and its text, score its layers, and judge the dense model."""
    source = Source(MODEL)
    model, tokenizer = load_stock(source, torch.float32), load_tokenizer(source)
    calibration = read_windows("stdlib:calibration", tokenizer, CALIBRATION, LENGTH, 0)
    evaluation = read_windows("stdlib:eval", tokenizer, EVALUATION, LENGTH, 0)
    heal = read_windows("stdlib:train", tokenizer, heal_windows(HEAL_TOKENS, LENGTH), LENGTH, 0)
    start = time.monotonic()
    scores = measure_scores(model, calibration)
    seconds = time.monotonic() - start
    [dense] = measure_accuracy([TorchRunner(model)], ["dense"], evaluation)
    return Bench(model, scores, seconds, evaluation, heal, dense)


def measure(bench: Bench) -> Iterable[Row]:
    """All rows, dense first, then by how many layers are gone."""
    nothing = Plan(bench.model.config.num_hidden_layers, ())
    yield row_of(bench, nothing, "dense", bench.model, bench.dense, 0.0)
    for removed in REMOVED:
        yield from random_rows(bench, removed)
        yield planned_row(bench, make_recipe({"method": "shortgpt", "remove": removed}), "shortgpt")
        for replacement in ("none", "layer", "mlp"):
            recipe = make_recipe({"method": "llm-streamline", "remove": removed, "replacement": replacement})
            healed = "" if replacement == "none" else ", healed"
            yield planned_row(bench, recipe, f"llm-streamline {replacement}{healed}")


def random_rows(bench: Bench, removed: int) -> Iterable[Row]:
    """Random removal: the mean of all draws, with the range in the place of an interval, and the best draw."""
    total = bench.model.config.num_hidden_layers
    draw = random.Random(removed)
    plans = [Plan(total, tuple(sorted(draw.sample(range(total), removed)))) for _ in range(DRAWS)]
    models = [edited(bench, plan) for plan in plans]
    rows = [
        row_of(bench, plan, f"random, best of {DRAWS}", model, accuracy, 0.0)
        for plan, model, accuracy in zip(plans, models, judge(bench, models), strict=True)
    ]
    drawn = [row.perplexity[0] for row in rows]
    mean, dense = (statistics.fmean(drawn), min(drawn), max(drawn)), bench.dense.perplexity(0).value
    best = min(rows, key=lambda row: row.perplexity[0])
    ratio = (mean[0] / dense, mean[1] / dense, mean[2] / dense)
    yield replace(best, name=f"random, mean of {DRAWS} (range)", layers="", perplexity=mean, ratio=ratio)
    yield best


def planned_row(bench: Bench, recipe: Recipe, name: str) -> Row:
    """One method: plan, replacement if it has one, edit, judgement. Seconds: scoring, training and editing."""
    plan = method_of(recipe, bench.scores.layers).plan(recipe, bench.scores)
    start = time.monotonic()
    model = edited(bench, plan)
    seconds = bench.score_seconds + time.monotonic() - start
    [accuracy] = judge(bench, [model])
    return row_of(bench, plan, name, model, accuracy, seconds)


def edited(bench: Bench, plan: Plan) -> PreTrainedModel:
    """A copy of the model changed as `plan` says, its replacement trained, its dead sublayers dropped."""
    model = copy.deepcopy(bench.model)
    replacement = build_replacement(model, plan)
    if replacement is not None:
        settings = HealSettings(default_lr(model.config.hidden_size))
        train_replacement(model, plan, replacement.layer, bench.heal, settings)
    apply_plan(model, plan, replacement)
    return drop_dead_sublayers(model, architecture_of(model.config))


def judge(bench: Bench, models: Sequence[PreTrainedModel]) -> list[Accuracy]:
    """All models against the dense one, on the same windows."""
    runners = [TorchRunner(model) for model in (bench.model, *models)]
    return measure_accuracy(runners, [str(number) for number in range(len(runners))], bench.evaluation)[1:]


def row_of(bench: Bench, plan: Plan, name: str, model: PreTrainedModel, accuracy: Accuracy, seconds: float) -> Row:
    """A row from a judged model."""
    perplexity, ratio = accuracy.perplexity(0), accuracy.perplexity_ratio(bench.dense, 0)
    return Row(
        plan.net,
        name,
        ", ".join(str(layer) for layer in plan.gone),
        (perplexity.value, perplexity.low, perplexity.high),
        (ratio.value, ratio.low, ratio.high),
        sum(parameter.numel() for parameter in model.parameters()),
        seconds,
    )


def table(rows: Iterable[Row]) -> str:
    """The rows in Markdown."""
    lines = [
        "| net layers gone | method | layers taken | perplexity (95%) | ratio to dense (95%) | parameters | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        perplexity = "{:.2f} ({:.2f} to {:.2f})".format(*row.perplexity)
        ratio = "{:.3f} ({:.3f} to {:.3f})".format(*row.ratio)
        cells = (row.removed, row.name, row.layers, perplexity, ratio, f"{row.parameters:,}", f"{row.seconds:.1f}")
        lines.append(f"| {' | '.join(str(cell) for cell in cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
