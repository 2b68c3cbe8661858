"""What the steps of pruning a model will take, from its files and the recipe, before any work is done."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

from transformers import PreTrainedConfig

from optimum.streamline.checkpoints.loading import DTYPES, load_tokenizer, only_dtype, stored_dtype
from optimum.streamline.checkpoints.model_in_memory import ModelInMemory
from optimum.streamline.costs.machine import Machine
from optimum.streamline.costs.speed import Types, measure_speed, measured_layers
from optimum.streamline.costs.steps import Circumstances, StepCost, model_size, step_costs
from optimum.streamline.model_files.source import ModelSource
from optimum.streamline.model_files.weight_files import find_weights
from optimum.streamline.models.linear_modules import is_trusted_code
from optimum.streamline.models.quantization_config import float_config, quantization_name
from optimum.streamline.recipe.quantities import memory_limit
from optimum.streamline.recipe.recipe import Recipe
from optimum.streamline.reporting.numbers import size
from optimum.streamline.system.disk import free_bytes
from optimum.streamline.system.library_logs import captured_logs
from optimum.streamline.system.memory import free_memory, taken_memory

from .exporting import export
from .larger_than_memory import (
    IN_MEMORY,
    can_share,
    computing_dtype,
    scoring_device,
    stays_on_disk,
    trains_adapters_on_copies,
    why_in_memory,
)
from .preflight import check_recipe, checked_config, result_dtype


def estimated_costs(source: ModelSource, recipe: Recipe, validates: bool = False) -> list[StepCost]:
    """Estimate what each step of `prune` takes on this machine, or of `run`.

    A few layers are measured, for the times. They are not if they would take more than half of the free memory, nor if
    the weights are quantized, or the checkpoint's own code runs.

    Args:
        source: A checkpoint.
        recipe: The recipe.
        validates: Whether the recipe is run: exported and validated too.

    Raises:
        StreamlineError: the recipe or the model cannot be used.
    """
    check_recipe(source, recipe)
    config = checked_config(source, recipe)
    stays = stays_on_disk(source, recipe, config, why_in_memory(recipe, config))
    around = _circumstances(source, recipe, config, stays)
    stock, config = quantization_name(config) is None and not is_trusted_code(config), float_config(config)
    few = measured_layers(config) * model_size(recipe, config).layer * around.types.computing.itemsize
    if stock and few * (5 if recipe.resolved_trainings else 2) < free_memory() / 2:
        export_to = partial(_export, recipe) if validates and recipe.export.format != "none" else None
        with captured_logs(None):
            speed = measure_speed(recipe, config, load_tokenizer(source), around.types, stays, export_to)
        around = replace(around, speed=speed)
    return step_costs(recipe, config, around, validates)


def costs_on(machine: Machine, source: ModelSource, recipe: Recipe, validates: bool = False) -> list[StepCost]:
    """Estimate what each step of `prune` or `run` takes on another machine, on its GPUs, without times.

    On several GPUs, one process for each shares the weights while they heal, if the recipe allows that.

    Args:
        machine: The machine.
        source: A checkpoint.
        recipe: The recipe. Its device does not matter.
        validates: As in `estimated_costs`.

    Raises:
        StreamlineError: the recipe or the model cannot be used.
    """
    check_recipe(source, recipe)
    config = checked_config(source, recipe)
    shared = machine.gpus > 1 and can_share(recipe)
    apart = shared or trains_adapters_on_copies(recipe)
    around = _circumstances(source, recipe, config, apart)
    needed = IN_MEMORY * model_size(recipe, float_config(config)).whole * around.types.computing.itemsize
    streams = needed > machine.memory and not why_in_memory(recipe, config)
    around = replace(
        around,
        on_disk=apart or streams,
        scored_on="cpu" if apart else "cuda",
        free=machine.memory,
        processes=machine.gpus if shared else 1,
    )
    recipe = recipe.with_options(device="cuda")
    if shared:
        first = recipe.resolved_trainings[0]
        recipe = recipe.with_options(heal_batch=-(-recipe.heal_batch(first) // machine.gpus))
    return step_costs(recipe, float_config(config), around, validates)


def disk_warning(source: ModelSource, recipe: Recipe, out: Path) -> str:
    """A line for the user if the disk of the output seems to have too little room for healing and the result.

    Args:
        source: The original.
        recipe: The recipe.
        out: The output folder, beside which healing keeps its files.

    Returns:
        The line; empty if there is room, or the model is in memory.

    Raises:
        StreamlineError: the recipe or the model cannot be used.
    """
    check_recipe(source, recipe)
    if isinstance(source, ModelInMemory):
        return ""
    config = checked_config(source, recipe)
    around = _circumstances(source, recipe, config, on_disk=False)
    costs = step_costs(recipe, float_config(config), around)
    needed = sum(cost.disk for cost in costs if cost.name in ("heal", "write"))
    free = free_bytes(out.absolute().parent)
    what = "healing and the result take" if recipe.resolved_trainings else "the result takes"
    return f"{what} about {size(needed)} of disk, and {size(free)} are free there" if needed > free else ""


def _circumstances(source: ModelSource, recipe: Recipe, config: PreTrainedConfig, on_disk: bool) -> Circumstances:
    quantized = quantization_name(config) is not None
    result = DTYPES[stored_dtype(source)] if quantized else result_dtype(source, recipe)
    largest_file = max(file.stat().st_size for file in find_weights(source.folder).files)
    program, limit = taken_memory(), memory_limit(recipe.max_memory)
    return Circumstances(
        Types(only_dtype(source), computing_dtype(source, recipe), result),
        on_disk,
        scoring_device(recipe),
        largest_file,
        program,
        free_memory() if limit is None else limit - program,
        None,
    )


def _export(recipe: Recipe, checkpoint: Path, out: Path) -> None:
    """Export a checkpoint as a recipe says, but in float."""
    export(str(checkpoint), out, format=recipe.export.format, dtype=recipe.dtype or "fp32", device=recipe.device)
