"""Read the texts of a run: calibration text, healing text and evaluation text."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from optimum.streamline.checkpoints.loading import load_tokenizer, read_config
from optimum.streamline.errors import StreamlineError
from optimum.streamline.healing.settings import heal_windows
from optimum.streamline.methods.registry import METHODS
from optimum.streamline.model_files.source import ModelSource
from optimum.streamline.recipe.recipe import Recipe
from optimum.streamline.text.overlap import check_disjoint
from optimum.streamline.text.sources import local_path
from optimum.streamline.text.windows import TooShortError, Windows, read_windows


def inputs_of(source: ModelSource, recipe: Recipe) -> tuple[str, ...]:
    """The paths and Hub ids of everything that a run reads. No output may replace them."""
    texts = (recipe.calibration.data, recipe.healing.data, recipe.evaluation.data)
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


def text_of_healing(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> Windows:
    """The healing windows: as many as hold `heal_tokens` tokens.

    Raises:
        StreamlineError: the text cannot be read or is too short.
    """
    count = heal_windows(recipe.healing.tokens, recipe.length)
    return _windows(recipe, tokenizer, config, recipe.healing.data, count, "train")


@dataclass(frozen=True)
class Texts:
    """All text of a run.

    Args:
        judged_on: The evaluation windows.
        chosen_on: The windows that the candidate is made with, by purpose: `calibration`, and `heal` with healing.
    """

    judged_on: Windows
    chosen_on: dict[str, Windows]


def read_texts(source: ModelSource, recipe: Recipe) -> Texts:
    """Read all text of a run, and check that the evaluation text shares nothing with the other texts.

    Raises:
        StreamlineError: a text cannot be read or is too short, or the evaluation text shares text with another.
    """
    tokenizer, config = load_tokenizer(source), read_config(source)
    judged_on = evaluation_text(recipe, tokenizer, config)
    chosen_on = {"calibration": text_of_choice(recipe, tokenizer, config)}
    if recipe.resolved_trainings:
        chosen_on["heal"] = text_of_healing(recipe, tokenizer, config)
    for windows in chosen_on.values():
        check_disjoint(windows.sketch, windows.spec, judged_on.sketch, judged_on.spec)
    return Texts(judged_on, chosen_on)


def _windows(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    config: PreTrainedConfig,
    spec: str,
    count: int,
    part: str,
) -> Windows:
    return read_windows(spec, tokenizer, count, recipe.length, recipe.seed, config.vocab_size, part)
