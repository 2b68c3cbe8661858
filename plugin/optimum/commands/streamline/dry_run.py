"""`--dry-run`: print the plan and the ideal speed-up, and write nothing."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich.console import Console
from transformers import PreTrainedConfig

from optimum.streamline.editing.apply import planned_config
from optimum.streamline.editing.plan import Plan
from optimum.streamline.errors import StreamlineError
from optimum.streamline.evaluation.theoretical_cost import cost_of
from optimum.streamline.pipeline.healing_memory import healing_memory
from optimum.streamline.pipeline.prune import prepare
from optimum.streamline.recipe.recipe import Recipe
from optimum.streamline.reporting.numbers import size

from .console import notifier


def dry_run(source: Any, recipe: Recipe, console: Console) -> int:
    """Print the plan of a recipe and its ideal speed-up.

    Returns:
        The exit code 0.

    Raises:
        StreamlineError: bad input, or the layers would have to be scored in an export.
    """
    if recipe.quantize_first and recipe.export.format != "none":
        raise StreamlineError(
            f"dry-run: with steps {recipe.quantization.steps!r} the layers are scored in an export, which a dry run "
            "does not make; leave dry-run out"
        )
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


def _print_effect(config: PreTrainedConfig, plan: Plan, context: int, console: Console) -> None:
    before, after = cost_of(config, "fp32"), cost_of(planned_config(config, plan), "fp32")
    used = after.live_parameters
    console.print(f"parameters: {before.parameters:,} -> {after.parameters:,} ({used:,} without skipped sublayers)")
    console.print(f"ideal decode speed-up: {before.decode_bytes(context) / after.decode_bytes(context):.2f}")
    console.print(f"ideal prefill speed-up: {before.prefill_flops(context) / after.prefill_flops(context):.2f}")
