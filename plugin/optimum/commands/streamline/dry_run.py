"""`--dry-run`: print the plan and the ideal speed-up, and write nothing."""

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
    before = cost_of(prepared.model.config, "fp32")
    after = cost_of(planned_config(prepared.model.config, prepared.plan), "fp32")
    context, used = recipe.length, after.live_parameters
    if recipe.quantization.quantizer != "none":
        console.print(f"effect of pruning alone, without quantizer {recipe.quantization.quantizer!r}:", markup=False)
    console.print(f"parameters: {before.parameters:,} -> {after.parameters:,} ({used:,} without skipped sublayers)")
    console.print(f"ideal decode speed-up: {before.decode_bytes(context) / after.decode_bytes(context):.2f}")
    console.print(f"ideal prefill speed-up: {before.prefill_flops(context) / after.prefill_flops(context):.2f}")
    return 0
