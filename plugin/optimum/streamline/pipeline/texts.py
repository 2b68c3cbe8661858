"""Read the texts of a run: calibration text, healing text and evaluation text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from optimum.streamline.checkpoints.loading import load_tokenizer, read_config
from optimum.streamline.errors import StreamlineError
from optimum.streamline.healing.settings import heal_windows
from optimum.streamline.methods.registry import METHODS
from optimum.streamline.model_files.source import ModelSource
from optimum.streamline.recipe.recipe import Recipe
from optimum.streamline.text.overlap import check_disjoint
from optimum.streamline.text.prompts import Prompts, calibration_prompts, file_prompts
from optimum.streamline.text.sources import SELF, is_self, local_path
from optimum.streamline.text.windows import TooShortError, Windows, read_windows

from .planning import reads_calibration


def inputs_of(source: ModelSource, recipe: Recipe) -> tuple[str, ...]:
    """The paths and Hub ids of everything that a run reads. No output may replace them."""
    heal_data = recipe.healing.data
    heals_on = [] if heal_data == SELF else [heal_data.removeprefix(f"{SELF}:") if is_self(heal_data) else heal_data]
    texts = (recipe.calibration.data, *heals_on, recipe.evaluation.data)
    models = (source.model, *([source.base.model] if source.base else []))
    return *models, *(str(local_path(spec)[0]) for spec in texts)


def text_of_choice(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> Windows:
    """The recipe's calibration windows, followed by held-out windows if its method compares plans.

    Raises:
        StreamlineError: the text cannot be read or is too short.
    """
    held_out = METHODS[recipe.resolved_method].held_out(recipe)
    try:
        return _windows(
            recipe, tokenizer, config, recipe.calibration.data, recipe.calibration.samples + held_out, "calibration"
        )
    except TooShortError as error:
        if not held_out:
            raise
        raise StreamlineError(
            f"{error}; samples is {recipe.calibration.samples}, and method {recipe.resolved_method} needs "
            f"{held_out} more windows to compare plans"
        ) from None


def calibration_text(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> Windows:
    """The recipe's `samples` calibration windows.

    Raises:
        StreamlineError: the text cannot be read or is too short.
    """
    return _windows(recipe, tokenizer, config, recipe.calibration.data, recipe.calibration.samples, "calibration")


def evaluation_text(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> Windows:
    """The recipe's `eval_samples` evaluation windows.

    Raises:
        StreamlineError: the text cannot be read or is too short.
    """
    return _windows(recipe, tokenizer, config, recipe.evaluation.data, recipe.evaluation.samples, "eval")


def text_of_healing(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> Windows | Prompts:
    """The healing windows, as many as hold `heal_tokens` tokens, or the prompts to sample them from.

    Raises:
        StreamlineError: the text cannot be read or is too short.
    """
    spec, count = recipe.healing.data, heal_windows(recipe.healing.tokens, recipe.length)
    if not is_self(spec):
        return _windows(recipe, tokenizer, config, spec, count, "train")
    how: dict[str, Any] = {"seed": recipe.seed, "vocabulary": config.vocab_size}
    if spec != SELF:
        return file_prompts(spec, tokenizer, count, recipe.length, **how)
    calibration = recipe.calibration
    return calibration_prompts(calibration.data, tokenizer, count, recipe.length, samples=calibration.samples, **how)


@dataclass(frozen=True)
class Texts:
    """All text of a run.

    Args:
        judged_on: The evaluation windows.
        chosen_on: The windows that the checkpoint is made with, by purpose: `calibration`, unless it needs none
            (`reads_calibration`), and `heal` with healing.
        calibration: The calibration windows, also those of a quantizer alone; `None` if nothing needs any.
        prompts: The prompts, in place of `heal`, if the original samples the healing text.
    """

    judged_on: Windows
    chosen_on: dict[str, Windows]
    calibration: Windows | None = None
    prompts: Prompts | None = None


def read_texts(source: ModelSource, recipe: Recipe, calibrates: bool) -> Texts:
    """Read all text of a run, and check that the evaluation text shares nothing with the other texts.

    Args:
        source: The original.
        recipe: The recipe.
        calibrates: Whether a quantizer needs calibration text.

    Raises:
        StreamlineError: a text cannot be read or is too short, or the evaluation text shares text with another.
    """
    tokenizer, config = load_tokenizer(source), read_config(source)
    judged_on = evaluation_text(recipe, tokenizer, config)
    reads = reads_calibration(recipe)
    calibration = text_of_choice(recipe, tokenizer, config) if reads or calibrates else None
    chosen_on = {} if calibration is None or not reads else {"calibration": calibration}
    healed_on = text_of_healing(recipe, tokenizer, config) if recipe.resolved_trainings else None
    if isinstance(healed_on, Windows):
        chosen_on["heal"] = healed_on
    prompts = healed_on if isinstance(healed_on, Prompts) else None
    for text in (calibration, healed_on):
        if text is not None:
            check_disjoint(text.sketch, text.spec, judged_on.sketch, judged_on.spec)
    return Texts(judged_on, chosen_on, calibration, prompts)


def _windows(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    config: PreTrainedConfig,
    spec: str,
    count: int,
    part: str,
) -> Windows:
    return read_windows(spec, tokenizer, count, recipe.length, recipe.seed, config.vocab_size, part)
