"""Models larger than memory: when the weights of an original stay on disk, and how it is loaded then."""

from __future__ import annotations

import math

import torch
from transformers import PreTrainedConfig

from optimum.streamline.checkpoints.loading import check_device, only_dtype
from optimum.streamline.checkpoints.model_in_memory import ModelInMemory
from optimum.streamline.editing.plan import TRAINED
from optimum.streamline.errors import StreamlineError
from optimum.streamline.methods.auto import makes_trials
from optimum.streamline.methods.registry import METHODS
from optimum.streamline.model_files.source import ModelSource
from optimum.streamline.model_files.weight_files import find_weights
from optimum.streamline.models.quantization_config import quantization_name
from optimum.streamline.quantization.quantizers import QUANTIZERS
from optimum.streamline.recipe.quantities import memory_limit
from optimum.streamline.recipe.recipe import Recipe
from optimum.streamline.reporting.numbers import size
from optimum.streamline.system.distributed import process_count, sharding
from optimum.streamline.system.memory import free_memory, taken_memory
from optimum.streamline.text.sources import is_self

IN_MEMORY = 1.2
"""The memory that a model takes while its layers are scored, as a multiple of its weights."""
ON_DISK = "the weights do not fit into memory in fp32: they stay on disk, and each is read when it is needed"
"""What the user is told if one process runs out of memory."""
ON_DISK_FOR_GPU = (
    "the weights do not fit on the GPU, or into memory, in fp32: they stay on disk, and each goes to the GPU when "
    "it is needed"
)
"""What the user is told if one process uses a GPU, and that or the memory is too small."""
SHARED = "the processes share the weights: they stay on disk until each process takes its part of every tensor"
"""What the user is told if processes share the weights in training."""
COPIES = "the weights stay on disk, and each is read when it is needed: the training holds copies in fewer bits only"
"""What the user is told if adapters are trained on a compact copy."""


def stays_on_disk(source: ModelSource, recipe: Recipe, config: PreTrainedConfig, needs_memory: str = "") -> bool:
    """Whether the weights of the original stay on disk.

    They do if they do not fit into memory in fp32, if processes share them in training, and if only copies of them are
    needed in memory.

    Args:
        source: The original.
        recipe: The recipe. Its `max_memory` is the limit; by default it is the memory that is free.
        config: The original's config.
        needs_memory: Why the weights must be in memory, as `why_in_memory` says; empty if they need not.

    Raises:
        StreamlineError: `max_memory` is no size, or too little for weights that must be in memory; or the processes are
            to share the weights in training, and the recipe needs all of them in each.
    """
    limit = memory_limit(recipe.max_memory)
    if sharding() is not None:
        check_device(recipe.device)
        if needs_memory:
            raise StreamlineError(
                f"ACCELERATE_USE_FSDP 'true': the recipe {needs_memory}, for which each process must hold all weights; "
                "launch without it, or share the weights in one training of all of them: heal lm or distill, with a "
                "method such as shortgpt or come"
            )
        return True
    if isinstance(source, ModelInMemory):
        return False
    if trains_adapters_on_copies(recipe) and not needs_memory and process_count() == 1:
        check_device(recipe.device)
        return True
    if process_count() > 1:  # each would read the weights, and find another amount of free memory
        needs_memory = "shares its work among processes"
    tensors, quantized = list(find_weights(source.folder).tensors()), quantization_name(config) is not None
    itemsize = computing_dtype(source, recipe).itemsize
    weights = sum(each.bytes if quantized else math.prod(each.shape) * itemsize for each in tensors)
    needed = math.ceil(IN_MEMORY * weights)
    fits = needed <= (free_memory() if limit is None else limit - taken_memory())
    if recipe.device != "cpu":  # the weights are in memory first, and then on the GPU
        check_device(recipe.device)
    if fits and (recipe.device == "cpu" or needed <= torch.cuda.mem_get_info()[0]):
        return False
    if needs_memory and limit is not None and not fits:
        raise StreamlineError(
            f"max-memory {recipe.max_memory!r}: the recipe {needs_memory}, so the weights must be in memory, and take "
            f"{size(needed + taken_memory())} with the program; give so much, or take a method such as shortgpt or "
            "come, with heal none or local, on device cpu"
        )
    return not needs_memory


def scoring_device(recipe: Recipe) -> str:
    """The device on which a model with its weights on disk is scored and edited.

    Where processes share the weights in training, or adapters are trained on a copy, the GPU's memory is for that.
    """
    return "cpu" if sharding() is not None or trains_adapters_on_copies(recipe) else recipe.device


def computing_dtype(source: ModelSource, recipe: Recipe) -> torch.dtype:
    """The type in which an original with float weights is loaded: fp32, or with `compute_dtype: stored` its own."""
    return torch.float32 if recipe.compute_dtype == "fp32" else only_dtype(source)


def why_in_memory(recipe: Recipe, config: PreTrainedConfig) -> str:
    """Why the weights must be in memory to carry out a recipe; empty if they can stay on disk.

    Args:
        recipe: The recipe.
        config: The original's config.
    """
    if name := quantization_name(config):
        return f"prunes quantized weights ({name})"
    if recipe.quantization.quantizer in QUANTIZERS:
        return f"quantizes by {recipe.quantization.quantizer}"
    if reason := METHODS[recipe.resolved_method].needs_memory(recipe, config):
        return f"{reason} (method {recipe.resolved_method})"
    if recipe.resolved_replacement in TRAINED:
        return f"puts in a new layer (replacement {recipe.resolved_replacement})"
    if recipe.resolved_trainings and is_self(recipe.healing.data):
        return f"lets the original sample text (heal-data {recipe.healing.data})"
    if set(recipe.resolved_trainings) - {"local"}:
        can = trains_adapters_on_copies(recipe) if sharding() is None else can_share(recipe)
        return "" if can else f"trains ({_trainings(recipe)})"
    if recipe.resolved_trainings and sharding() is not None and recipe.device != "cpu":
        return f"trains layers on {recipe.device} (heal local)"
    return ""


def can_share(recipe: Recipe) -> bool:
    """Whether processes can share the weights that a recipe trains: in one training of the model, after the edit."""
    healing = recipe.healing
    kept = healing.original == "fp32" and healing.cache in (None, "none")
    return _trains_once(recipe) and not healing.lora and kept and not makes_trials(recipe)


def trains_adapters_on_copies(recipe: Recipe) -> bool:
    """Whether only compact copies are in memory when a recipe trains: of the edited model, and of the original."""
    healing = recipe.healing
    compact = healing.lora_base != "fp32" and (healing.original != "fp32" or recipe.resolved_trainings == ("lm",))
    return _trains_once(recipe) and healing.lora and compact


def _trains_once(recipe: Recipe) -> bool:
    return len(recipe.resolved_trainings) == 1 and not METHODS[recipe.resolved_method].stepwise


def _trainings(recipe: Recipe) -> str:
    healing = recipe.healing
    words = [f"heal {'+'.join(recipe.resolved_trainings)}", *["lora"] * healing.lora]
    words += [f"heal-cache {healing.cache}"] * (healing.cache is not None)
    words += [f"heal-original {healing.original}"] * (healing.original != "fp32")
    words += [f"method {recipe.resolved_method}"] * makes_trials(recipe)
    return ", ".join(words)


def why_on_disk(recipe: Recipe) -> str:
    """A line for the user on why the weights stay on disk."""
    if sharding() is not None:
        return SHARED
    if trains_adapters_on_copies(recipe):
        return COPIES
    return ON_DISK if recipe.device == "cpu" else ON_DISK_FOR_GPU
