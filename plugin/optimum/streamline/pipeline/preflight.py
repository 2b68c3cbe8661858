"""Everything about a recipe that can be refused before a weight is loaded."""

from __future__ import annotations

import copy
from typing import get_args

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from optimum.streamline.checkpoints.loading import DTYPES, check_checkpoint, stored_dtype
from optimum.streamline.checkpoints.model_in_memory import ModelInMemory
from optimum.streamline.errors import StreamlineError
from optimum.streamline.healing.checks import check_heal_windows, check_healing
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


def check_quantization(recipe: Recipe, config: PreTrainedConfig) -> None:
    """Refuse a quantization that a recipe cannot have, and a recipe that a quantized model cannot take.

    Raises:
        StreamlineError: naming the field, the value and what would be right.
    """
    quantizer = recipe.quantization.quantizer
    for field in ("quantize_exclude", "steps"):
        value = recipe.option(field)
        if value is not None and quantizer == NONE:
            raise StreamlineError(f"{field.replace('_', '-')} {value!r}: nothing is quantized; give quantize too")
    name = quantization_name(config)
    check_writable(config, recipe.device)
    # Tried on a copy, to hear now whether the layers' new numbers could be written where it names them by the old.
    renumber_quantization(copy.deepcopy(config), architecture_of(config).layers, range(config.num_hidden_layers))
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
        _check_removal_alone(recipe, name or quantizer)
    if quantizer in QUANTIZERS and recipe.resolved_replacement in get_args(BareKind):
        raise StreamlineError(
            f"replacement {recipe.resolved_replacement!r}: leaves bare layers, which quantize {quantizer!r} "
            "cannot take; use another replacement"
        )
    if recipe.dtype is not None and (name is not None or (recipe.quantize_first and quantizer in QUANTIZERS)):
        quantized = name or quantizer
        raise StreamlineError(
            f"dtype {recipe.dtype!r}: the model is quantized ({quantized}) and stays so; leave it out"
        )


def refuse_unpacking(model: PreTrainedModel) -> None:
    """Refuse to change a quantized model whose weights would be unpacked before they are saved.

    Raises:
        StreamlineError: they would.
    """
    name = quantization_name(model.config)
    if name is not None and not stays_quantized_in_forward(model):
        raise StreamlineError(
            f"model: its weights are quantized ({name}), and are unpacked when it first computes, so they could not be "
            "written back as they were; prune the float model and quantize then"
        )


def _check_graph_quantization(recipe: Recipe) -> None:
    ways, quantizer = graph_quantizers(), recipe.quantization.quantizer
    if quantizer not in ways:
        raise StreamlineError(f"quantize {quantizer!r}: unknown; one of {', '.join((NONE, *QUANTIZERS, *ways))}")
    if recipe.export.format != "onnx":
        raise StreamlineError(f"quantize {quantizer!r}: is made of an ONNX graph; give format 'onnx' to `run`")
    if not recipe.quantize_first:
        return
    if ways[quantizer]:
        raise StreamlineError(
            f"steps {recipe.quantization.steps!r}: {quantizer} is calibrated on what the layers before give, which "
            "those that go would change; use steps 'prune,quantize', or a quantizer without calibration, such as 'int4'"
        )
    if not METHODS[recipe.resolved_method].by_scores or recipe.pruning.iterative:
        able = [name for name, method in METHODS.items() if method.by_scores]
        raise StreamlineError(
            f"method {recipe.resolved_method!r}: tries changes on the model, and a quantized graph is only scored; "
            f"with steps {recipe.quantization.steps!r} use one of {', '.join(able)}, not iterative"
        )


def _check_removal_alone(recipe: Recipe, quantization: str) -> None:
    """Refuse all that needs float weights."""
    instead = "prune the float model and quantize then (steps 'prune,quantize')"
    refused = f"needs float weights, and here they are quantized ({quantization})"
    method = METHODS[recipe.resolved_method]
    if method.needs_float:
        able = [name for name, each in METHODS.items() if not each.needs_float]
        raise StreamlineError(
            f"method {recipe.resolved_method!r}: {method.needs_float}, so it {refused}; {instead}, or use one of "
            f"{', '.join(able)}"
        )
    if recipe.resolved_replacement != "none":
        raise StreamlineError(
            f"replacement {recipe.resolved_replacement!r}: {refused}; {instead}, or use replacement 'none'"
        )
    if recipe.resolved_trainings:
        raise StreamlineError(f"heal {'+'.join(recipe.resolved_trainings)!r}: {refused}; {instead}, or use heal 'none'")


def check_recipe(source: ModelSource, recipe: Recipe) -> None:
    """Everything about a recipe that can be refused without loading a weight.

    Raises:
        StreamlineError: the model, the method, a count or a length is wrong.
    """
    config = checked_config(source, recipe)
    if quantization_name(config) is None:
        result_dtype(source, recipe)  # refuses what a result could not be stored in
    method_of(recipe, config)
    check_quantization(recipe, config)
    check_healing(recipe)
    check_heal_windows(recipe, config.num_hidden_layers)


def result_dtype(source: ModelSource, recipe: Recipe) -> torch.dtype:
    """What the result of a recipe is stored in, where the original's weights are float.

    Raises:
        StreamlineError: the original's own type is asked for, and nothing can be stored in it.
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
    """The config of a model that can be handled, and that takes the recipe's windows.

    Raises:
        StreamlineError: it cannot, or does not; or a model in memory is on another device than the recipe says.
    """
    if isinstance(source, ModelInMemory):
        config = source.loaded.config
        if (device := source.loaded.device.type) != recipe.device:
            raise StreamlineError(
                f"device {recipe.device!r}: the model in memory is on {device}; give device {device!r}, or move it"
            )
    else:
        config = check_checkpoint(source)
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and recipe.length > longest:
        raise StreamlineError(
            f"length {recipe.length}: the model reads at most {longest} tokens (max_position_embeddings)"
        )
    return config
