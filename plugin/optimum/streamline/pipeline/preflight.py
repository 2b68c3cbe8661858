"""Refuse wrong recipes before any weight is loaded."""

from __future__ import annotations

import copy
from typing import get_args

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from optimum.streamline.checkpoints.loading import DTYPES, check_checkpoint, stored_dtype
from optimum.streamline.checkpoints.model_in_memory import ModelInMemory
from optimum.streamline.costs.healing_memory import warning
from optimum.streamline.errors import StreamlineError
from optimum.streamline.healing.checks import check_heal_cache, check_heal_windows, check_healing
from optimum.streamline.methods.registry import METHODS, method_of
from optimum.streamline.model_files.source import ModelSource
from optimum.streamline.models.architectures import architecture_of
from optimum.streamline.models.bare_layers import BareKind
from optimum.streamline.models.linear_modules import linear_modules_of, meta_model
from optimum.streamline.models.module_patterns import select_modules
from optimum.streamline.models.quantization_config import (
    check_writable,
    float_config,
    quantization_name,
    renumber_quantization,
)
from optimum.streamline.models.quantized_weights import stays_quantized_in_forward
from optimum.streamline.quantization.loading import check_quantizable
from optimum.streamline.quantization.quantizers import NONE, QUANTIZERS
from optimum.streamline.recipe.recipe import Recipe

from .exporting import graph_quantizers
from .larger_than_memory import stays_on_disk, why_in_memory


def check_quantization(recipe: Recipe, config: PreTrainedConfig) -> None:
    """Refuse a recipe whose quantization contradicts its other options, or that needs float weights and has none.

    Args:
        recipe: The recipe.
        config: The original's config.

    Raises:
        StreamlineError: the message names the field, its value and what would be right.
    """
    quantizer = recipe.quantization.quantizer
    for field in ("quantize_exclude", "steps"):
        value = recipe.option(field)
        if value is not None and quantizer == NONE:
            raise StreamlineError(f"{field.replace('_', '-')} {value!r}: nothing is quantized; give quantize too")
    name = quantization_name(config)
    check_writable(config, recipe.device)
    # If the quantization config names layers, removal must renumber them there. Try it now, on a copy.
    layers = range(config.num_hidden_layers)
    renumber_quantization(copy.deepcopy(config), architecture_of(config), layers, layers)
    if METHODS[recipe.resolved_method].may_pack(recipe, config):  # attentions with MLPs of the layer after
        renumber_quantization(copy.deepcopy(config), architecture_of(config), layers[:-1], layers[1:])
    if quantizer in QUANTIZERS:
        check_quantizable(config, quantizer, recipe.excluded)
        if recipe.export.format != "none":
            raise StreamlineError(
                f"format {recipe.export.format!r}: quantize {quantizer!r} makes a checkpoint that "
                "torch runs; use a quantizer of ONNX graphs, such as 'int4', or format 'none'"
            )
    elif quantizer != NONE:
        _check_graph_quantization(recipe)
        select_modules(linear_modules_of(meta_model(float_config(config))), recipe.excluded)
    if name is not None or recipe.quantize_first:
        _check_removal_alone(
            recipe,
            config,
            f"needs float weights, and here they are quantized ({name or quantizer})",
            "prune the float model, then quantize it (steps 'prune,quantize')",
        )
    if quantizer in QUANTIZERS and recipe.resolved_replacement in get_args(BareKind):
        raise StreamlineError(
            f"replacement {recipe.resolved_replacement!r}: makes bare layers, which quantize "
            f"{quantizer!r} does not support; use another replacement"
        )
    if recipe.dtype is not None and (name is not None or (recipe.quantize_first and quantizer in QUANTIZERS)):
        quantized = name or quantizer
        raise StreamlineError(
            f"dtype {recipe.dtype!r}: the weights are quantized ({quantized}) and keep their type; leave it out"
        )


def refuse_unpacking(model: PreTrainedModel) -> None:
    """Refuse to prune a quantized model if its first forward pass would dequantize the weights for good.

    Raises:
        StreamlineError: the weights do not stay quantized.
    """
    name = quantization_name(model.config)
    if name is not None and not stays_quantized_in_forward(model):
        raise StreamlineError(
            f"model: its quantized weights ({name}) are dequantized by the first forward pass, and could not be saved "
            "in their format again; prune the float model, then quantize it"
        )


def _check_graph_quantization(recipe: Recipe) -> None:
    calibrated, quantizer = graph_quantizers(), recipe.quantization.quantizer
    if quantizer not in calibrated:
        known = ", ".join((NONE, *QUANTIZERS, *calibrated))
        raise StreamlineError(f"quantize {quantizer!r}: unknown; one of {known}")
    if recipe.export.format != "onnx":
        raise StreamlineError(f"quantize {quantizer!r}: quantizes ONNX graphs; use `run` with format 'onnx'")
    if not recipe.quantize_first:
        return
    if calibrated[quantizer]:
        raise StreamlineError(
            f"steps {recipe.quantization.steps!r}: {quantizer} is calibrated on the inputs of each layer, which "
            "change when layers are removed; use steps 'prune,quantize', or a quantizer without calibration, such as "
            "'int4'"
        )
    if not METHODS[recipe.resolved_method].by_scores or recipe.pruning.iterative:
        able = [name for name, method in METHODS.items() if method.by_scores]
        raise StreamlineError(
            f"method {recipe.resolved_method!r}: edits and runs the model to choose layers, which a quantized graph "
            f"does not allow; with steps {recipe.quantization.steps!r} use one of {', '.join(able)}, without iterative"
        )


def _check_removal_alone(recipe: Recipe, config: PreTrainedConfig, refused: str, instead: str) -> None:
    """Refuse everything but the removal of layers, whole or packed: the rest computes weights.

    Args:
        recipe: The recipe.
        config: The original's config.
        refused: What anything else needs and does not have, for the message.
        instead: What to do instead.
    """
    if refusal := METHODS[recipe.resolved_method].quantized_refusal(recipe, config):
        able = [name for name, each in METHODS.items() if not each.quantized_refusal(recipe, config)]
        raise StreamlineError(
            f"method {recipe.resolved_method!r}: {refusal}, so it {refused}; {instead}, or use one of {', '.join(able)}"
        )
    if recipe.resolved_replacement != "none":
        raise StreamlineError(
            f"replacement {recipe.resolved_replacement!r}: {refused}; {instead}, or use replacement 'none'"
        )
    if recipe.resolved_trainings:
        raise StreamlineError(f"heal {'+'.join(recipe.resolved_trainings)!r}: {refused}; {instead}, or use heal 'none'")


def check_recipe(source: ModelSource, recipe: Recipe) -> None:
    """Refuse a recipe or a model that cannot be used, without loading a weight.

    Raises:
        StreamlineError: the message names the model or the field, its value and what would be right.
    """
    config = checked_config(source, recipe)
    if quantization_name(config) is None:
        result_dtype(source, recipe)  # refuses a type that a checkpoint cannot store
    method_of(recipe, config)
    check_quantization(recipe, config)
    if recipe.compute_dtype != "fp32":
        asked = f"needs fp32, and compute-dtype is {recipe.compute_dtype!r}"
        _check_removal_alone(recipe, config, asked, "leave compute-dtype out")
    check_healing(recipe)
    check_heal_windows(recipe, config.num_hidden_layers)
    check_heal_cache(recipe, config.vocab_size)
    if recipe.max_memory is not None:
        # Both refuse a limit that is too low.
        warning(recipe, config, stays_on_disk(source, recipe, config, why_in_memory(recipe, config)))


def result_dtype(source: ModelSource, recipe: Recipe) -> torch.dtype:
    """The type in which the result's weights are stored, for an original with float weights.

    Raises:
        StreamlineError: the recipe leaves `dtype` out, and the type of the model in memory is not one of `DTYPES`.
    """
    if recipe.dtype is not None:
        return DTYPES[recipe.dtype]
    if not isinstance(source, ModelInMemory):
        return DTYPES[stored_dtype(source)]
    dtype: torch.dtype = source.loaded.dtype
    if dtype not in DTYPES.values():
        raise StreamlineError(
            f"model: its weights are {dtype}; convert it to one of {', '.join(DTYPES)}, or give dtype"
        )
    return dtype


def checked_config(source: ModelSource, recipe: Recipe) -> PreTrainedConfig:
    """Check a model, and the recipe's `device` and `length` against it.

    Returns:
        The model's config.

    Raises:
        StreamlineError: the model is broken, not supported, reads fewer than `length` tokens, or is in memory on
            another device.
    """
    if isinstance(source, ModelInMemory):
        config = source.loaded.config
        if (device := source.loaded.device.type) != recipe.device:
            raise StreamlineError(
                f"device {recipe.device!r}: the model in memory is on {device}; give {device!r}, or move the model"
            )
    else:
        config = check_checkpoint(source)
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and recipe.length > longest:
        raise StreamlineError(
            f"length {recipe.length}: the model reads at most {longest} tokens (max_position_embeddings)"
        )
    return config
