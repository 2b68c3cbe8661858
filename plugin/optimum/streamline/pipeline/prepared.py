"""A loaded model with its scores and its plan. Editing, healing and saving take it as input.

Works on loaded models, so that the commands and Python share each step.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from optimum.streamline.checkpoints.loading import load_stock
from optimum.streamline.checkpoints.model_in_memory import ModelInMemory
from optimum.streamline.editing.apply import planned_config
from optimum.streamline.editing.merging import shared_copy
from optimum.streamline.editing.plan import Plan
from optimum.streamline.errors import StreamlineError
from optimum.streamline.methods.base import MethodInputs
from optimum.streamline.methods.registry import METHODS, method_of
from optimum.streamline.model_files.source import ModelSource
from optimum.streamline.models.skipped_sublayers import layers_without_attention
from optimum.streamline.quantization.loading import check_quantizable, load_quantizing
from optimum.streamline.quantization.quantizers import QUANTIZERS
from optimum.streamline.recipe.recipe import Recipe
from optimum.streamline.scoring.similarity import Scores
from optimum.streamline.text.windows import Windows

from .preflight import refuse_unpacking


@dataclass
class Prepared:
    """A model, its scores and the plan for it, before any weight moves.

    Args:
        source: The original.
        recipe: What is done to it.
        model: The original in memory, which is edited in place.
        tokenizer: The original's.
        stored: What the result is stored in; `None` if as it was read, which is how quantized weights stay.
        chosen_on: What the choice is made on: `calibration`, and what plans are compared on where they are. `None`
            where the layers are named and no text is read.
        heal_text: What is trained on, where something is.
        scores: The layers' scores; `None` where nothing was measured.
        plan: What becomes of each layer.
        seconds: How long each step took.
    """

    source: ModelSource
    recipe: Recipe
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    stored: torch.dtype | None
    chosen_on: Windows | None
    heal_text: Windows | None
    scores: Scores | None
    plan: Plan
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def calibration(self) -> Windows | None:
        """What layers are scored, maps fitted and channels measured on: the recipe's `samples` windows."""
        return None if self.chosen_on is None else self.chosen_on.part(0, self.recipe.calibration.samples)


def quantizes_first(recipe: Recipe) -> bool:
    """Whether the original's weights are quantized before its layers are scored."""
    return recipe.quantize_first and recipe.quantization.quantizer in QUANTIZERS


def load_original(source: ModelSource, recipe: Recipe, config: PreTrainedConfig) -> PreTrainedModel:
    """Load the original to be pruned, quantized where that comes first.

    Computation is in fp32 whatever the checkpoint is stored in: a score is a difference of nearly equal numbers.

    Raises:
        StreamlineError: its weights cannot be read, or are quantized and could not be written back.
    """
    if quantizes_first(recipe):
        in_float = check_quantizable(config, recipe.quantization.quantizer, recipe.excluded)
        return load_quantizing(source, recipe.quantization.quantizer, in_float, recipe.device)
    model = load_stock(source, torch.float32, recipe.device)
    refuse_unpacking(model)
    return model


def choose_plan(
    model: PreTrainedModel, recipe: Recipe, config: PreTrainedConfig, chosen_on: Windows, scores: Scores
) -> Plan:
    """What the recipe's method chooses for a loaded model, which stays as it is.

    Args:
        model: The original, in fp32, in evaluation mode.
        config: The original's, as its checkpoint has it.
        chosen_on: The recipe's `samples` calibration windows, and after them those that plans are compared on.
        scores: `measure_scores` of the model.

    Raises:
        StreamlineError: the method cannot follow the recipe, or would leave no layer with attention.
    """
    calibration = chosen_on.part(0, recipe.calibration.samples)
    held_out = (
        chosen_on.part(recipe.calibration.samples, len(chosen_on.ids))
        if len(chosen_on.ids) > recipe.calibration.samples
        else None
    )
    plan = method_of(recipe, config).plan(recipe, MethodInputs(model, calibration, scores, held_out))
    refuse_no_attention(model.config, plan)
    return plan


def refuse_no_attention(config: PreTrainedConfig, plan: Plan) -> None:
    """Refuse a plan that leaves no layer with attention.

    Args:
        config: The original's.

    Raises:
        StreamlineError: it does.
    """
    planned = planned_config(config, plan)
    if len(layers_without_attention(planned)) == planned.num_hidden_layers:
        raise StreamlineError("model: no layer with attention would be left; remove fewer, or other layers")


def chooses_by_scores_alone(recipe: Recipe) -> bool:
    """Whether scores that were measured earlier are all that the recipe's method looks at."""
    return METHODS[recipe.resolved_method].by_scores and not recipe.pruning.iterative


def names_layers(recipe: Recipe) -> bool:
    """Whether the recipe names its layers and needs no text to take them out."""
    return recipe.resolved_method == "explicit" and recipe.resolved_replacement != "linear"


def original_in_fp32(source: ModelSource, device: str) -> PreTrainedModel:
    """The original to compute with, in fp32, in evaluation mode; nobody may change its weights.

    Args:
        source: A checkpoint, or a model in memory, which stays as it is. The result shares its weights if they are
            fp32 already.
        device: Where a checkpoint is loaded.

    Raises:
        StreamlineError: a weight is missing, of the wrong shape, truncated or not finite.
    """
    if not isinstance(source, ModelInMemory):
        return load_stock(source, torch.float32, device)
    floats = {value.dtype for value in source.loaded.parameters()}
    model = shared_copy(source.loaded) if floats == {torch.float32} else copy.deepcopy(source.loaded).float()
    model.eval()
    return model
