"""`--dry-run`: print what each step takes, the plan and the ideal speed-up, and write nothing."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table
from transformers import PreTrainedConfig

from optimum.streamline.costs.healing_memory import healing_memory
from optimum.streamline.costs.machine import Machine
from optimum.streamline.costs.steps import StepCost
from optimum.streamline.editing.apply import planned_config
from optimum.streamline.editing.plan import Plan
from optimum.streamline.errors import StreamlineError
from optimum.streamline.evaluation.theoretical_cost import cost_of
from optimum.streamline.pipeline.estimating import costs_on, estimated_costs
from optimum.streamline.pipeline.prune import prepare
from optimum.streamline.recipe.recipe import Recipe
from optimum.streamline.reporting.numbers import duration, size
from optimum.streamline.system.distributed import process_count

from .console import notifier


def dry_run(source: Any, recipe: Recipe, args: Namespace, console: Console, validates: bool = False) -> int:
    """Print what the steps of a recipe take, then its plan and its ideal speed-up.

    Args:
        source: The original.
        recipe: The recipe.
        args: The arguments of the command. With `on`, only what the steps take on that machine is printed.
        console: Where to print.
        validates: Whether the command also exports and validates.

    Returns:
        The exit code 0.

    Raises:
        StreamlineError: bad input, the layers would have to be scored in an export, or there are several processes.
    """
    if recipe.quantize_first and recipe.export.format != "none":
        raise StreamlineError(
            f"dry-run: with steps {recipe.quantization.steps!r} the layers are scored in an export, which a dry run "
            "does not make; leave dry-run out"
        )
    if (processes := process_count()) > 1:
        raise StreamlineError(
            f"dry-run: {processes} processes were launched; run it alone, and name GPUs that share the weights by on, "
            "such as '8x H100-80GB'"
        )
    if args.on is not None:
        _print_costs_on(Machine.parse(args.on), source, recipe, console, validates)
        return 0
    console.print("estimating what each step takes", markup=False)
    estimate = estimated_costs(source, recipe, validates)
    _print_costs(estimate.steps, console)
    if estimate.why_no_times:
        console.print(f"no times: {estimate.why_no_times}", markup=False)
    prepared = prepare(source, recipe, notifier(console))
    if recipe.quantization.quantizer != "none":
        console.print(f"effect of pruning alone, without quantizer {recipe.quantization.quantizer!r}:", markup=False)
    if prepared.candidates:
        console.print("trial trainings, which a dry run does not make, choose one of these plans:", markup=False)
    for plan in prepared.candidates or (prepared.plan,):
        if prepared.candidates:
            console.print(plan.describe(), markup=False)
        _print_effect(prepared.model.config, plan, recipe.length, console)
    if recipe.resolved_trainings:
        memory = healing_memory(recipe, prepared.model.config, prepared.on_disk is not None)
        parts = ", ".join(f"{name} {size(number)}" for name, number in asdict(memory).items() if number)
        console.print(f"memory of healing, about: {size(memory.total)} ({parts})", markup=False)
    return 0


def _print_costs_on(machine: Machine, source: Any, recipe: Recipe, console: Console, validates: bool) -> None:
    costs = costs_on(machine, source, recipe, validates)
    _print_costs(costs, console)
    for cost in costs:
        if cost.gpu > machine.memory:
            console.print(
                f"{cost.name} does not fit: it takes about {size(cost.gpu)} of a GPU, and each of {machine.name!r} has "
                f"{size(machine.memory)}",
                markup=False,
            )


def _print_costs(costs: Sequence[StepCost], console: Console) -> None:
    """Print a table of what each step takes; columns with no figure are left out."""
    columns = {
        "memory": [size(cost.memory) for cost in costs],
        "GPU": [size(cost.gpu) if cost.gpu else "" for cost in costs],
        "disk": [size(cost.disk) if cost.disk else "" for cost in costs],
        "time": [duration(cost.seconds) if cost.seconds else "" for cost in costs],
    }
    shown = {name: column for name, column in columns.items() if any(column)}
    table = Table("step, about", *shown, box=None)
    for cost, *row in zip(costs, *shown.values(), strict=True):
        table.add_row(cost.name, *row)
    console.print(table)


def _print_effect(config: PreTrainedConfig, plan: Plan, context: int, console: Console) -> None:
    before, after = cost_of(config, "fp32"), cost_of(planned_config(config, plan), "fp32")
    used = after.live_parameters
    console.print(f"parameters: {before.parameters:,} -> {after.parameters:,} ({used:,} without skipped sublayers)")
    console.print(f"ideal decode speed-up: {before.decode_bytes(context) / after.decode_bytes(context):.2f}")
    console.print(f"ideal prefill speed-up: {before.prefill_flops(context) / after.prefill_flops(context):.2f}")
