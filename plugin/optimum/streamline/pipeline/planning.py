"""A loaded model with its scores and its plan: the input of editing, healing and saving.

The functions take loaded models, so that the commands and the Python API share them.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from tempfile import TemporaryDirectory

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from optimum.streamline.checkpoints.loading import load_stock
from optimum.streamline.checkpoints.model_in_memory import ModelInMemory
from optimum.streamline.editing.apply import planned_config, with_skips
from optimum.streamline.editing.merging import shared_copy
from optimum.streamline.editing.plan import FITTED, Plan
from optimum.streamline.errors import StreamlineError
from optimum.streamline.methods.base import MethodInputs
from optimum.streamline.methods.explicit import Explicit
from optimum.streamline.methods.registry import METHODS, method_of
from optimum.streamline.model_files.source import ModelSource
from optimum.streamline.models.skipped_sublayers import layers_without_attention
from optimum.streamline.quantization.loading import check_quantizable, load_quantizing
from optimum.streamline.quantization.quantizers import QUANTIZERS
from optimum.streamline.recipe.recipe import OPTIONS, Recipe
from optimum.streamline.scoring.similarity import Scores
from optimum.streamline.text.prompts import Prompts
from optimum.streamline.text.windows import Windows

from .larger_than_memory import computing_dtype
from .preflight import refuse_unpacking


@dataclass
class Prepared:
    """A model, its scores and its plan, before any weight changes.

    Args:
        source: Where the original comes from.
        recipe: The recipe of the run.
        model: The original in memory. Later steps edit it in place.
        tokenizer: The original's tokenizer.
        stored: The type in which the result is stored. `None` keeps the type of each weight, as quantized weights need.
        chosen_on: The text on which the plan was chosen: the calibration windows, then the held-out windows if the
            method compares plans. `None` if the recipe names the layers, so that no text is read.
        heal_text: The healing text, or the prompts from which the original is to sample it; `None` without healing.
        scores: The scores of the layers; `None` if nothing was measured.
        plan: The plan.
        candidates: The plans that trial trainings choose from, `plan` first; empty if there are no trials.
        seconds: The duration of each step, by the step's name.
        on_disk: The folder of `load_on_disk`, if the weights of `model` stay on disk; it is deleted with this object.
    """

    source: ModelSource
    recipe: Recipe
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    stored: torch.dtype | None
    chosen_on: Windows | None
    heal_text: Windows | Prompts | None
    scores: Scores | None
    plan: Plan
    candidates: tuple[Plan, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)
    on_disk: TemporaryDirectory[str] | None = None

    @property
    def calibration(self) -> Windows | None:
        """The recipe's `samples` calibration windows, on which layers are scored and linear maps fitted."""
        return None if self.chosen_on is None else self.chosen_on.part(0, self.recipe.calibration.samples)


def quantizes_first(recipe: Recipe) -> bool:
    """Whether the original's weights are quantized before its layers are scored."""
    return recipe.quantize_first and recipe.quantization.quantizer in QUANTIZERS


def load_original(source: ModelSource, recipe: Recipe, config: PreTrainedConfig) -> PreTrainedModel:
    """Load the original into memory for pruning, and quantize it if the recipe quantizes first.

    Float weights of any stored type are loaded in fp32, because scores are differences of nearly equal numbers, unless
    the recipe asks for their own type.

    Raises:
        StreamlineError: the weights cannot be read, or they are quantized and could not be saved in their format again.
    """
    if quantizes_first(recipe):
        in_float = check_quantizable(config, recipe.quantization.quantizer, recipe.excluded)
        return load_quantizing(source, recipe.quantization.quantizer, in_float, recipe.device)
    model = load_stock(source, computing_dtype(source, recipe), recipe.device)
    refuse_unpacking(model)
    return model


def choose_plans(
    model: PreTrainedModel,
    recipe: Recipe,
    config: PreTrainedConfig,
    chosen_on: Windows,
    scores: Scores,
    for_trials: bool = False,
) -> tuple[Plan, ...]:
    """Let the recipe's method make its plans for a loaded model. The model is unchanged afterwards.

    Args:
        model: The original, in evaluation mode, in fp32 or quantized.
        recipe: The recipe.
        config: The config in the original's checkpoint.
        chosen_on: The recipe's `samples` calibration windows, then the held-out windows if the method compares plans.
        scores: The scores of the model.
        for_trials: Whether trial trainings choose among the plans.

    Returns:
        The plan; for trials, all plans to choose from, the best before healing first.

    Raises:
        StreamlineError: the method cannot follow the recipe, or would leave no layer with attention.
    """
    calibration = chosen_on.part(0, recipe.calibration.samples)
    held_out = (
        chosen_on.part(recipe.calibration.samples, len(chosen_on.ids))
        if len(chosen_on.ids) > recipe.calibration.samples
        else None
    )
    method, inputs = method_of(recipe, config), MethodInputs(model, calibration, scores, held_out)
    plans = method.plans(recipe, inputs) if for_trials else (method.plan(recipe, inputs),)
    # A third-party method need not know what the model skips already.
    plans = tuple(with_skips(plan, model.config) for plan in plans)
    possible = tuple(plan for plan in plans if _attention_stays(model.config, plan))
    if not possible:
        refuse_no_attention(model.config, plans[0])
    return possible


def refuse_no_attention(config: PreTrainedConfig, plan: Plan) -> None:
    """Refuse a plan that leaves no layer with attention.

    Args:
        config: The original's config.
        plan: The plan.

    Raises:
        StreamlineError: no layer with attention would be left.
    """
    if not _attention_stays(config, plan):
        raise StreamlineError("model: no layer with attention would be left; remove fewer, or other layers")


def _attention_stays(config: PreTrainedConfig, plan: Plan) -> bool:
    planned = planned_config(config, plan)
    return bool(len(layers_without_attention(planned)) < planned.num_hidden_layers)


def chooses_by_scores_alone(recipe: Recipe) -> bool:
    """Whether the recipe's method needs only the scores, so that scores measured earlier are enough."""
    return METHODS[recipe.resolved_method].by_scores and not recipe.pruning.iterative


def names_layers(recipe: Recipe) -> bool:
    """Whether the recipe names the layers to remove, and no text is needed to choose them or to fit a replacement."""
    return recipe.resolved_method == "explicit" and recipe.resolved_replacement not in FITTED


def reads_calibration(recipe: Recipe) -> bool:
    """Whether the calibration text is read: if layers are chosen or a replacement fitted on it, or if it is given."""
    return not names_layers(recipe) or recipe.calibration.data != OPTIONS["calibration"].default


def named_plan(recipe: Recipe, config: PreTrainedConfig) -> Plan:
    """The plan of a recipe of method `explicit`. It needs neither scores nor text.

    Args:
        recipe: The recipe.
        config: The original's config.

    Raises:
        StreamlineError: a layer does not exist, or no layer with attention would be left.
    """
    method = method_of(recipe, config)
    assert isinstance(method, Explicit), recipe.resolved_method
    plan = with_skips(method.named_plan(recipe, config.num_hidden_layers), config)
    refuse_no_attention(config, plan)
    return plan


def original_in_fp32(source: ModelSource, device: str) -> PreTrainedModel:
    """The original in fp32 and in evaluation mode. Do not change its weights: they may be the caller's own.

    Args:
        source: A checkpoint, or a model in memory. The result shares the weights of an fp32 model in memory, and has a
            copy of the weights of any other.
        device: The device on which a checkpoint is loaded.

    Raises:
        StreamlineError: a weight is missing, of the wrong shape, truncated or not finite.
    """
    if not isinstance(source, ModelInMemory):
        return load_stock(source, torch.float32, device)
    floats = {value.dtype for value in source.loaded.parameters()}
    model = shared_copy(source.loaded) if floats == {torch.float32} else copy.deepcopy(source.loaded).float()
    model.eval()
    return model
