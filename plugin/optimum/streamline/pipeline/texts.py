"""Reading all text of a run: what layers are chosen on, healed on and judged on."""

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
    """What a run reads, which no output may replace."""
    texts = (recipe.calibration.data, recipe.healing.data, recipe.evaluation.data)
    models = (source.model, *([source.base.model] if source.base else []))
    return *models, *(str(local_path(spec)[0]) for spec in texts)


def text_of_choice(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> Windows:
    """The calibration windows, and after them those to compare plans on where the method does.

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
            f"{error}; samples are {recipe.calibration.samples}, and method {recipe.resolved_method} reads {held_out} "
            "more windows to compare what its candidates choose"
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
    """The windows that `heal_tokens` tokens are, to train on.

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
        chosen_on: Those that choices are made on, by purpose: `calibration`, and `heal` where there is healing.
    """

    judged_on: Windows
    chosen_on: dict[str, Windows]


def read_texts(source: ModelSource, recipe: Recipe) -> Texts:
    """Read all text of a run, the judgement's apart from the choices'.

    Raises:
        StreamlineError: a text cannot be read or is too short, or the choices are made on what they are judged on.
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
