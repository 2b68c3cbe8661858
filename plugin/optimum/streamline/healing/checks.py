"""Checks of a recipe's healing fields: each must fit the replacement, the method and the other healing fields."""

from __future__ import annotations

import os
import shutil

from optimum.streamline.editing.plan import TRAINED
from optimum.streamline.errors import StreamlineError, require_extra
from optimum.streamline.methods.auto import makes_trials
from optimum.streamline.methods.registry import METHODS
from optimum.streamline.recipe.quantities import parse_remove
from optimum.streamline.recipe.recipe import Recipe
from optimum.streamline.text.sources import SELF

from .output_cache import CacheForm
from .settings import heal_windows, scope_of
from .trainer import check_sharing

# Recipe fields that apply to every kind of healing.
_OF_ANY_TRAINING = (
    "heal_data",
    "heal_tokens",
    "heal_minutes",
    "heal_lr",
    "heal_epochs",
    "heal_batch",
    "heal_micro_batch",
    "heal_dtype",
    "heal_optimizer",
)


def check_healing(recipe: Recipe) -> None:
    """Refuse healing fields that contradict each other or would have no effect.

    A recipe with an explicit `heal: none` may keep the fields that apply to every kind of healing. So the same recipe
    can be run with and without healing.

    Raises:
        StreamlineError: naming the field, the value and what would be right.
    """
    _check_what_is_trained(recipe)
    _check_distillation(recipe)
    _check_forms(recipe)
    if recipe.resolved_trainings and recipe.healing.optimizer == "adamw-8bit":
        _check_optimizer(recipe)
    if (data := recipe.healing.data).startswith((f"{SELF}+", f"{SELF},")):
        raise StreamlineError(
            f"heal-data {data!r}: text that the original samples cannot be mixed with other text; give {SELF}, "
            f"{SELF}:PROMPTS, or another text"
        )
    fields = recipe.recorded_options()
    needs = [
        ("heal_scope", {"lm", "distill"}),
        ("gradient_checkpointing", {"lm", "distill"}),
        ("heal_normalised", {"hidden-mse"}),
    ]
    if recipe.healing.trainings is None:
        needs += [(field, {"hidden-mse", "local", "lm", "distill"}) for field in _OF_ANY_TRAINING]
    for field, stages in needs:
        if field in fields and not stages & set(recipe.resolved_trainings):
            raise StreamlineError(
                f"{field.replace('_', '-')} {recipe.option(field)!r}: has no effect with heal "
                f"{'+'.join(recipe.resolved_trainings) or 'none'}; it needs heal {' or '.join(sorted(stages))}"
            )
    if "lora_rank" in fields and not recipe.healing.lora:
        raise StreamlineError(f"lora-rank {recipe.healing.lora_rank}: has no effect without lora; add lora")


def _check_forms(recipe: Recipe) -> None:
    """Refuse a compact form of weights where there is none, or where fp32 is needed."""
    original, base = recipe.healing.original, recipe.healing.lora_base
    if base != "fp32" and not recipe.healing.lora:
        raise StreamlineError(f"lora-base {base!r}: has no effect without lora; add lora")
    if original != "fp32" and "distill" not in recipe.resolved_trainings:
        raise StreamlineError(f"heal-original {original!r}: has no effect without heal distill; use it")
    if original != "fp32" and ("local" in recipe.resolved_trainings or makes_trials(recipe)):
        what = "heal local" if "local" in recipe.resolved_trainings else f"method {recipe.resolved_method}"
        raise StreamlineError(
            f"heal-original {original!r}: {what} compares with the original in fp32; leave heal-original out, or use "
            "heal distill with a method other than auto"
        )
    if {original, base} & {"int8", "nf4"}:
        require_extra("bitsandbytes.nn", "bitsandbytes")


def _check_optimizer(recipe: Recipe) -> None:
    """Refuse the optimizer of torchao without torchao, or on a CPU without a C++ compiler: it compiles its update."""
    require_extra("torchao.optim", "torchao")
    if recipe.device == "cpu" and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))):
        raise StreamlineError(
            f"heal-optimizer {recipe.healing.optimizer!r}: compiles its update, and there is no C++ compiler (g++, or "
            "the one that CXX names); install one, or use adamw"
        )


def check_heal_windows(recipe: Recipe, layers: int) -> None:
    """Refuse a healing text with too few windows, or a batch that cannot be divided among the processes.

    Args:
        recipe: A recipe that its method has checked.
        layers: The number of layers of the original.

    Raises:
        StreamlineError: naming the field, the value and what would be right.
    """
    if recipe.resolved_trainings:
        stepwise = METHODS[recipe.resolved_method].stepwise
        trainings = parse_remove(str(recipe.pruning.remove), layers) if stepwise else 1
        windows = heal_windows(recipe.healing.tokens, recipe.length)
        for training in recipe.resolved_trainings:
            check_sharing(windows, recipe.heal_batch(training), recipe.healing.epochs, trainings)


def check_heal_cache(recipe: Recipe, vocabulary: int) -> None:
    """Refuse a `heal_cache` of the most probable tokens that would be all tokens.

    Args:
        recipe: The recipe.
        vocabulary: The number of tokens of the vocabulary.

    Raises:
        StreamlineError: naming the field, the value and what would be right.
    """
    form = CacheForm.parse(recipe.healing.cache or "none")
    if form is not None and form.kind == "top" and form.tokens >= vocabulary:
        raise StreamlineError(f"heal-cache {recipe.healing.cache!r}: the vocabulary has {vocabulary} tokens; give full")


def _check_what_is_trained(recipe: Recipe) -> None:
    trained, one_of = recipe.resolved_replacement in TRAINED, ", ".join(TRAINED)
    if "hidden-mse" in recipe.resolved_trainings and not trained:
        raise StreamlineError(
            f"heal {recipe.healing.trainings!r}: hidden-mse trains a replacement; use replacement {one_of}"
        )
    if "local" in recipe.resolved_trainings:
        _check_local(recipe, trained)
    if recipe.healing.scope == "replacement" and not trained:
        raise StreamlineError(
            f"heal-scope 'replacement': there is no trained replacement; use replacement {one_of}, or heal-scope model"
        )
    if recipe.healing.lora and (
        recipe.healing.scope == "replacement" or not {"lm", "distill"} & set(recipe.resolved_trainings)
    ):
        raise StreamlineError("lora: has no training to use; use heal lm or distill, with heal-scope model")
    scopes = [scope_of(recipe, number, trained) for number in range(len(recipe.resolved_trainings))]
    if recipe.healing.lora and recipe.resolved_replacement in ("ffn", "swiglu") and "replacement" not in scopes:
        raise StreamlineError(
            f"lora: adapters alone would leave the weights of replacement {recipe.resolved_replacement} random; "
            f"train it first, by heal hidden-mse+{recipe.resolved_trainings[-1]}"
        )


def _check_local(recipe: Recipe, trained: bool) -> None:
    if trained:
        raise StreamlineError(
            f"heal {recipe.healing.trainings!r}: local trains layers of the original, and replacement "
            f"{recipe.resolved_replacement} is none; train it by hidden-mse"
        )
    if METHODS[recipe.resolved_method].stepwise:
        raise StreamlineError(
            f"heal {recipe.healing.trainings!r}: method {recipe.resolved_method} heals after every merge, and local "
            "would undo that; use heal distill, or another method"
        )


def _check_distillation(recipe: Recipe) -> None:
    for field in ("heal_kl", "heal_hidden", "heal_cache", "heal_replace"):
        if recipe.option(field) is not None and "distill" not in recipe.resolved_trainings:
            raise StreamlineError(
                f"{field.replace('_', '-')} {recipe.option(field)}: has no effect without heal distill; use it"
            )
    if recipe.healing.replace and recipe.healing.epochs == 1:
        raise StreamlineError(
            f"heal-replace {recipe.healing.replace}: has no effect with heal-epochs 1, because only passes after the "
            "first replace tokens; give more epochs, or leave it out"
        )
    if recipe.pruning.method in ("come-sp", "come-mp") and "distill" not in recipe.resolved_trainings:
        raise StreamlineError(
            f"heal {recipe.healing.trainings!r}: method {recipe.pruning.method} heals by distillation; "
            "use heal distill, or method come"
        )
    if (recipe.healing.kl, recipe.healing.hidden) == (0, 0):
        raise StreamlineError("heal-kl 0 and heal-hidden 0: heal distill would ignore the original; use heal lm")
