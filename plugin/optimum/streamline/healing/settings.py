"""How a training goes and how it went: settings, their defaults, and the log. Trains nothing."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from optimum.streamline.errors import StreamlineError
from optimum.streamline.recipe.recipe import Recipe

HELD_OUT_SHARE = 0.05
Scope = Literal["replacement", "model"]


@dataclass(frozen=True)
class HealSettings:
    """How weights are trained, by AdamW; decay, clipping and the cosine's end are LLM-Streamline's (arXiv 2403.19135).

    Args:
        lr: Peak learning rate, such as `default_lr`; the cosine ends at `min_lr_share` of it.
        epochs: Passes over the training windows.
        batch: Windows an update, over all processes.
        minutes: Longest time; the rate then follows whichever is further on, updates or time.
        warmup_share: Share of the updates that raise the rate from zero.
        betas: AdamW's.
        decay_vectors: Whether weight decay is on biases and norms too, and not on matrices only.
        clip: Largest gradient norm.
        lora_rank: Train adapters of this rank on every linear layer but the head, in place of the weights.
        seed: Of the order of the windows, and of the adapters.
    """

    lr: float
    epochs: int = 4
    batch: int = 8
    minutes: float | None = None
    min_lr_share: float = 0.25
    warmup_share: float = 0.05
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 1e-3
    decay_vectors: bool = True
    clip: float = 5.0
    lora_rank: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class HealStep:
    """One update: its number from 1, its learning rate, its loss, and the held-out loss where it was measured."""

    step: int
    lr: float
    loss: float
    held_out: float | None


@dataclass(frozen=True)
class HealLog:
    """How a training went.

    Args:
        before: Held-out loss before the first update.
        best: Held-out loss of the weights that were kept.
        best_step: The update they come from; 0 if no update made it better.
        steps: Every update.
    """

    before: float
    best: float
    best_step: int
    steps: tuple[HealStep, ...]


def default_lr(width: int) -> float:
    """The peak learning rate of a replacement alone, `width` the hidden size: LLM-Streamline's 2e-4 at 4096.

    A layer of smaller width takes, and needs, a rate as many times higher (measured: `docs/methods.md`).
    """
    return 2e-4 * 4096 / width


def default_model_lr(width: int, goal: str) -> float:
    """The peak learning rate of all weights: LayerChop's 3e-4 (arXiv 2305.14864), and more to distil a small model.

    The original's logits and states say more than the next token does, so the smaller a model is, the higher a rate it
    takes; to the next token it forgets at such a rate more than it learns (measured: `docs/methods.md`).

    Args:
        width: The model's hidden size.
        goal: One of `Recipe.resolved_trainings`.
    """
    return 3e-4 * math.sqrt(4096 / width) if goal == "distill" else 3e-4


def default_lora_lr(width: int, goal: str) -> float:
    """The peak learning rate of adapters on a whole model: three times `default_model_lr`."""
    return 3 * default_model_lr(width, goal)


def scope_of(recipe: Recipe, number: int, trained: bool) -> Scope:
    """What the training of that number in `recipe.resolved_trainings` trains.

    Left out, `heal_scope` is LLM-Streamline's own order: an `lm` that comes first trains the replacement, whose weights
    are new, and what follows trains the model, by adapters where there is `lora`. A single `lm` with `lora` is the
    model's, or there would be no adapters.

    Args:
        trained: Whether a trained layer stands in for the block.
    """
    if recipe.resolved_trainings[number] == "hidden-mse":
        return "replacement"
    if recipe.healing.scope is not None:
        return recipe.healing.scope
    first = recipe.resolved_trainings[number] == "lm" and number == 0 and trained
    return "replacement" if first and (not recipe.healing.lora or len(recipe.resolved_trainings) > 1) else "model"


def replacement_settings(recipe: Recipe, width: int, goal: str) -> HealSettings:
    """How LLM-Streamline trains a replacement alone; its betas are .9/.95 where the loss is the language model's.

    Args:
        width: The model's hidden size.
        goal: One of `recipe.resolved_trainings`.
    """
    return HealSettings(
        lr=recipe.healing.lr or default_lr(width),
        epochs=recipe.healing.epochs,
        batch=recipe.healing.batch,
        minutes=recipe.healing.minutes,
        betas=(0.9, 0.999) if goal == "hidden-mse" else (0.9, 0.95),
        seed=recipe.seed,
    )


def model_settings(recipe: Recipe, width: int, goal: str) -> HealSettings:
    """How all weights are trained: to the next token as by LayerChop (arXiv 2305.14864), or to the original.

    LayerChop's are the rate, the decay and a cosine that ends at a tenth of the peak; a decay of matrices only, the
    betas and the clipping are this program's. Distillation goes on from weights that are good already: nothing pulls
    them to zero, and the rate ends there, which leaves less of the error of single batches in them (measured:
    `docs/methods.md`). Adapters do not decay: what they add is small as it is.

    Args:
        width: The model's hidden size.
        goal: One of `recipe.resolved_trainings`.
    """
    lr = default_lora_lr(width, goal) if recipe.healing.lora else default_model_lr(width, goal)
    distils = goal == "distill"
    return HealSettings(
        lr=recipe.healing.lr or lr,
        epochs=recipe.healing.epochs,
        batch=recipe.healing.batch,
        minutes=recipe.healing.minutes,
        min_lr_share=0.0 if distils else 0.1,
        betas=(0.9, 0.999) if distils else (0.9, 0.95),
        weight_decay=0.0 if distils or recipe.healing.lora else 0.1,
        decay_vectors=False,
        clip=1.0,
        lora_rank=recipe.healing.lora_rank if recipe.healing.lora else None,
        seed=recipe.seed,
    )


def heal_windows(tokens: int, length: int) -> int:
    """How many windows `tokens` tokens are, the held-out ones among them.

    Raises:
        StreamlineError: too few to train on some and hold out one.
    """
    if tokens < 2 * length:
        raise StreamlineError(f"heal-tokens {tokens}: must be at least two windows of {length} tokens, {2 * length}")
    return tokens // length
