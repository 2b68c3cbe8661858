"""`--dry-run`: print the plan and what it would save, and write nothing."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from optimum.streamline.editing.apply import planned_config
from optimum.streamline.errors import StreamlineError
from optimum.streamline.evaluation.theoretical_cost import cost_of
from optimum.streamline.pipeline.prune import prepare
from optimum.streamline.recipe.recipe import Recipe

from .console import notifier


def dry_run(source: Any, recipe: Recipe, console: Console) -> int:
    """Print the plan of a recipe and the ideal speed-up; returns the exit code 0."""
    if recipe.quantize_first and recipe.export.format != "none":
        raise StreamlineError(
            f"dry-run: with steps {recipe.quantization.steps!r} layers are scored in an export, which is not made"
        )
    prepared = prepare(source, recipe, notifier(console))
    before = cost_of(prepared.model.config, "fp32")
    after = cost_of(planned_config(prepared.model.config, prepared.plan), "fp32")
    context = recipe.length
    if recipe.quantization.quantizer != "none":
        console.print(f"of the removal alone, before quantize {recipe.quantization.quantizer!r}:", markup=False)
    console.print(
        f"parameters: {before.parameters:,} -> {after.parameters:,} ({after.live_parameters:,} to compute with)"
    )
    console.print(f"ideal decode speed-up: {before.decode_bytes(context) / after.decode_bytes(context):.2f}")
    console.print(f"ideal prefill speed-up: {before.prefill_flops(context) / after.prefill_flops(context):.2f}")
    return 0
