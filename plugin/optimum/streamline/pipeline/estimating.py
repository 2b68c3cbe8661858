"""What the steps of pruning a model will take, from its files and the recipe, before any work is done."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from transformers import PreTrainedConfig

from optimum.streamline.checkpoints.loading import DTYPES, load_tokenizer, only_dtype, stored_dtype
from optimum.streamline.checkpoints.model_in_memory import ModelInMemory
from optimum.streamline.costs.machine import Machine
from optimum.streamline.costs.speed import EMBEDDED, Types, measure_speed, measured_layers
from optimum.streamline.costs.steps import Circumstances, StepCost, model_size, step_costs
from optimum.streamline.errors import first_line
from optimum.streamline.model_files.source import ModelSource
from optimum.streamline.model_files.weight_files import find_weights
from optimum.streamline.models.linear_modules import is_trusted_code
from optimum.streamline.models.quantization_config import float_config, quantization_name
from optimum.streamline.recipe.quantities import memory_limit
from optimum.streamline.recipe.recipe import Recipe
from optimum.streamline.reporting.numbers import size
from optimum.streamline.system.disk import free_bytes
from optimum.streamline.system.distributed import process_count, sharding
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


@dataclass(frozen=True)
class Estimate:
    """What each step takes.

    Args:
        steps: The steps, in order.
        why_no_times: Why nothing is known of the time; empty if the times are known.
    """

    steps: list[StepCost]
    why_no_times: str = ""


def estimated_costs(source: ModelSource, recipe: Recipe, validates: bool = False) -> Estimate:
    """Estimate what each step of `prune` takes on this machine, or of `run`. For the times a few layers are measured.

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
    around = _circumstances(source, recipe, config, stays, Path("healing"))
    if why := _why_not_measured(recipe, config, around):
        return Estimate(step_costs(recipe, float_config(config), around, validates), why)
    export_to = partial(_export, recipe) if validates and recipe.export.format != "none" else None
    try:
        with captured_logs(None):
            tokenizer = load_tokenizer(source)
            speed = measure_speed(recipe, config, tokenizer, around.types, stays, around.scored_on, export_to)
    except Exception as error:  # the plan, and the estimates of memory and disk, need no measurement
        return Estimate(step_costs(recipe, config, around, validates), f"measuring failed ({first_line(error)})")
    return Estimate(step_costs(recipe, config, replace(around, speed=speed), validates))


def _why_not_measured(recipe: Recipe, config: PreTrainedConfig, around: Circumstances) -> str:
    """Why a few layers cannot be measured for a recipe; empty if they can."""
    if around.quantized is not None:
        return "the weights are quantized"
    if is_trusted_code(config):
        return "the model has code of its own"
    numbers = measured_layers(config, around.on_disk) * model_size(recipe, config).layer
    numbers += 2 * min(EMBEDDED, config.vocab_size * config.hidden_size)
    types, trains = around.types, bool(recipe.resolved_trainings)
    # On disk, memory holds the random weights as they are stored, and then about one layer at a time.
    each = types.stored.itemsize if around.on_disk and not trains else types.computing.itemsize
    needed = numbers * each * (5 if trains else 2)
    return "" if needed < min(around.free, free_memory()) else "a few layers would fill the memory"


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
    unhealed = why_in_memory(recipe.with_options(heal="none"), config)
    shared = machine.gpus > 1 and can_share(recipe) and not unhealed and recipe.resolved_trainings != ("local",)
    apart = shared or trains_adapters_on_copies(recipe)
    around = _circumstances(source, recipe, config, apart, Path("healing"))
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


def disk_warning(source: ModelSource, recipe: Recipe, out: Path, exports: bool = False) -> str:
    """A line for the user if the disk of the output seems to have too little room for what is written there.

    Args:
        source: The original.
        recipe: The recipe.
        out: The output folder, beside which healing keeps its files.
        exports: Whether the exports of the recipe follow, into the output folder.

    Returns:
        The line; empty if there is room, if the model is in memory, or if it has code of its own, which may not run
        without weights.

    Raises:
        StreamlineError: the recipe or the model cannot be used.
    """
    check_recipe(source, recipe)
    if isinstance(source, ModelInMemory):
        return ""
    config = checked_config(source, recipe)
    if is_trusted_code(config):
        return ""
    around = _circumstances(source, recipe, config, False, out.absolute().parent / "healing")
    if sharding() is not None:
        around = replace(around, processes=process_count())
    room = {cost.name: cost.disk for cost in step_costs(recipe, float_config(config), around, exports)}
    # Healing deletes its files before anything is exported.
    larger = max(("heal", "export"), key=lambda name: room.get(name, 0))
    needed, free = room["write"] + room.get(larger, 0), free_bytes(out.absolute().parent)
    what = {"heal": "healing and the result take", "export": "the result and the exports take"}[larger]
    if larger not in room:
        what = "the result takes"
    return f"{what} about {size(needed)} of disk, and {size(free)} are free there" if needed > free else ""


def _circumstances(
    source: ModelSource, recipe: Recipe, config: PreTrainedConfig, on_disk: bool, folder: Path
) -> Circumstances:
    quantized, weights = quantization_name(config) is not None, find_weights(source.folder)
    result = DTYPES[stored_dtype(source)] if quantized else result_dtype(source, recipe)
    largest_file = max(file.stat().st_size for file in weights.files)
    program, limit = taken_memory(), memory_limit(recipe.max_memory)
    return Circumstances(
        Types(only_dtype(source), computing_dtype(source, recipe), result),
        on_disk,
        scoring_device(recipe),
        largest_file,
        program,
        free_memory() if limit is None else limit - program,
        folder,
        None,
        quantized=weights.bytes if quantized else None,
        pickled=weights.bytes * weights.pickled,
    )


def _export(recipe: Recipe, checkpoint: Path, out: Path) -> None:
    """Export a checkpoint as a recipe says, but in float."""
    export(str(checkpoint), out, format=recipe.export.format, dtype=recipe.dtype or "fp32", device=recipe.device)
