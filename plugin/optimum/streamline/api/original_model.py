"""The original model, and what is computed from it: scores and plans. Nothing here changes the model."""

from __future__ import annotations

from dataclasses import replace

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from optimum.streamline.checkpoints.loading import load_tokenizer
from optimum.streamline.checkpoints.model_in_memory import ModelInMemory
from optimum.streamline.editing.apply import with_skips
from optimum.streamline.errors import StreamlineError
from optimum.streamline.methods.explicit import Explicit
from optimum.streamline.methods.registry import method_of
from optimum.streamline.model_files.source import ModelSource
from optimum.streamline.models.quantization_config import quantization_name
from optimum.streamline.pipeline.planning import (
    choose_plans,
    chooses_by_scores_alone,
    named_plan,
    names_layers,
    original_in_fp32,
)
from optimum.streamline.pipeline.preflight import check_recipe, checked_config
from optimum.streamline.pipeline.texts import calibration_text, text_of_choice
from optimum.streamline.recipe.parsing import make_recipe
from optimum.streamline.recipe.recipe import Recipe
from optimum.streamline.scoring.similarity import measure_scores
from optimum.streamline.system.distributed import process_count
from optimum.streamline.text.windows import Windows

from .results import Plan, Scores


class Original:
    """The original model: its source, its config, and its weights and tokenizer once a step has needed them."""

    def __init__(self, source: ModelSource, config: PreTrainedConfig) -> None:
        self.source, self.config = source, config
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._model: PreTrainedModel | None = None

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Its tokenizer, loaded when it is first asked for."""
        if self._tokenizer is None:
            source = self.source
            self._tokenizer = source.tokenizer if isinstance(source, ModelInMemory) else load_tokenizer(source)
        return self._tokenizer

    @property
    def layers(self) -> int:
        """How many decoder layers it has."""
        layers: int = self.config.num_hidden_layers
        return layers

    @property
    def device(self) -> str:
        """Where its weights are, or are loaded if nobody says where."""
        if isinstance(self.source, ModelInMemory):
            return self.source.loaded.device.type
        return "cpu" if self._model is None else self._model.device.type

    def model_on(self, device: str) -> PreTrainedModel:
        """The model in fp32, in evaluation mode, loaded when it is first asked for; nobody may change its weights."""
        if self._model is None:
            self._model = original_in_fp32(self.source, device)
        if not isinstance(self.source, ModelInMemory) and quantization_name(self.config) is None:
            module: nn.Module = self._model  # transformers' own `to` carries no types
            module.to(device)
        return self._model

    def score(self, recipe: Recipe) -> Scores:
        """As `Streamliner.score`."""
        checked_config(self.source, recipe)
        windows = calibration_text(recipe, self.tokenizer, self.config)
        return Scores.of(measure_scores(self.model_on(recipe.device), windows), windows)

    def plan(self, recipe: Recipe, scores: Scores | None) -> Plan:
        """As `Streamliner.plan`."""
        self.check(recipe)
        if scores is None and names_layers(recipe):
            return Plan.of(named_plan(recipe, self.config), recipe)
        chosen_on = self._text_of_choice(recipe, scores)
        model = self.model_on(recipe.device)
        found = scores or measure_scores(model, chosen_on.part(0, recipe.calibration.samples))
        made, *_ = choose_plans(model, recipe, self.config, chosen_on, found)
        return Plan.of(made, recipe, scores=found, chosen_on=chosen_on)

    def checked_plan(self, plan: Plan) -> tuple[Plan, Recipe]:
        """A plan with the text that its edit needs, and the recipe it is carried out by.

        Raises:
            StreamlineError: the plan is of another model, or cannot be carried out by itself.
        """
        if plan.total != self.layers:
            raise StreamlineError(f"plan: is for a model of {plan.total} layers; this one has {self.layers}")
        recipe = plan.recipe or self._recipe_of(plan)
        self.check(recipe)
        if plan.chosen_on is None and not names_layers(recipe):
            plan = replace(plan, chosen_on=text_of_choice(recipe, self.tokenizer, self.config))
        return with_skips(plan, self.config), recipe

    def check(self, recipe: Recipe) -> None:
        """Refuse a recipe that this model cannot take, or that only the whole chain can follow.

        Raises:
            StreamlineError: naming the field, the value and what would be right.
        """
        if recipe.compute_dtype != "fp32":
            raise StreamlineError(
                f"compute-dtype {recipe.compute_dtype!r}: the steps compute in fp32; use `optimum-cli streamline`"
            )
        if recipe.max_memory is not None:
            raise StreamlineError(
                f"max-memory {recipe.max_memory!r}: the steps keep the weights in memory; use `optimum-cli streamline`"
            )
        check_recipe(self.source, recipe)
        if process_count() > 1:
            raise StreamlineError("the steps work in one process; `optimum-cli streamline prune` can share its work")
        if name := quantization_name(self.config):
            raise StreamlineError(f"model {self.source.model!r}: is quantized ({name}); use streamline, or prune float")
        if recipe.quantize_first:
            raise StreamlineError(
                f"steps {recipe.quantization.steps!r}: the steps prune the float model; call streamline instead"
            )

    def _text_of_choice(self, recipe: Recipe, scores: Scores | None) -> Windows:
        if scores is None:
            return text_of_choice(recipe, self.tokenizer, self.config)
        if scores.layers != self.layers:
            raise StreamlineError(f"scores: are of a model of {scores.layers} layers; this one has {self.layers}")
        if scores.windows is None:
            raise StreamlineError("scores: do not say what text they were measured on; give what score() returned")
        if chooses_by_scores_alone(recipe):
            return scores.windows
        text = text_of_choice(recipe, self.tokenizer, self.config)
        # A method that needs more windows draws others from the same text than the score did.
        measured_on = scores.windows.fingerprint
        if measured_on not in (
            text.part(0, recipe.calibration.samples).fingerprint,
            calibration_text(recipe, self.tokenizer, self.config).fingerprint,
        ):
            raise StreamlineError(
                f"scores: were measured on other windows than calibration {recipe.calibration.data!r} gives, which "
                f"method {recipe.resolved_method} reads; score with this config"
            )
        return text

    def _recipe_of(self, plan: Plan) -> Recipe:
        """The recipe of a plan written by hand."""
        if not plan.removed:
            raise StreamlineError("plan: removed () names no layer; name at least one, such as removed=(5,)")
        layers = {"layers": list(plan.removed), "replacement": plan.replacement}
        recipe = make_recipe(layers, "plan")
        method_of(recipe, self.config)
        if Explicit().named_plan(recipe, self.layers) != plan.plain():
            raise StreamlineError(
                "plan: one written by hand names whole layers in `removed`, rising, and nothing else but "
                "`replacement`; for the rest give a config"
            )
        return recipe
