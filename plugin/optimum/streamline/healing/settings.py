"""The settings of a training with their defaults, and the log of a training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from optimum.streamline.errors import StreamlineError
from optimum.streamline.models.architectures import architecture_of, decoder_layers
from optimum.streamline.models.offloaded_weights import read_parameter
from optimum.streamline.recipe.healing import Form, HealDtype, Optimizer
from optimum.streamline.recipe.recipe import Recipe
from optimum.streamline.system.distributed import process_count

# The share of the healing windows that is not trained on, but used to choose the best weights.
HELD_OUT_SHARE = 0.05
# How often the held-out loss is measured during a training, after it was measured once before.
EVALUATIONS = 10
# An empty file that is written last into the folder of a checkpoint, when the checkpoint is complete.
COMPLETE_FILE = "whole"
# By how much an update at the default peak rate changes the output of a matrix, at most, as a share of that output.
CHANGES = {"distill": 0.22, "local": 0.9}
Scope = Literal["replacement", "layer", "model"]


@dataclass(frozen=True)
class HealSettings:
    """The settings of one training by AdamW, with linear warmup and a cosine schedule.

    The default decay, clipping and end of the cosine are LLM-Streamline's (arXiv 2403.19135).

    Args:
        lr: The peak learning rate.
        epochs: The number of passes over the training windows.
        batch: The number of windows in an update, over all processes.
        micro_batch: The most windows that a process computes at a time; `None` for all of its windows of an update.
            The gradients of an update are added up, so this changes its result by rounding only.
        gradient_checkpointing: Keep only the input of each decoder layer for the gradient, and compute the layer again.
        dtype: `bf16` for mixed precision: matrix products in bf16, weights, losses and updates in fp32.
        optimizer: `adamw-8bit` keeps the moments of AdamW in 8 bits (torchao's `AdamW8bit`).
        minutes: The time limit. The schedule then follows the updates or the time, whichever has progressed further.
        min_lr_share: The learning rate at the end of the cosine, as a share of the peak.
        warmup_share: The share of the updates in which the learning rate rises from zero to the peak.
        betas: The betas of AdamW.
        weight_decay: The weight decay of AdamW.
        decay_vectors: Whether biases and norms decay too, and not only matrices.
        clip: The largest gradient norm; a larger gradient is scaled down.
        replaced: The share of tokens that passes after the first replace by others (`text/replaced_tokens.py`).
        lora_rank: Train LoRA adapters of this rank instead of the weights, on every linear module but the output head.
        lora_base: The form of the weights under the adapters (`recipe.healing.Healing`).
        seed: The seed of the order of the windows, and of the adapters.
    """

    lr: float
    epochs: int = 4
    batch: int = 8
    micro_batch: int | None = None
    gradient_checkpointing: bool = False
    dtype: HealDtype = "fp32"
    optimizer: Optimizer = "adamw"
    minutes: float | None = None
    min_lr_share: float = 0.25
    warmup_share: float = 0.05
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 1e-3
    decay_vectors: bool = True
    clip: float = 5.0
    replaced: float = 0.0
    lora_rank: int | None = None
    lora_base: Form = "fp32"
    seed: int = 0


@dataclass(frozen=True)
class HealStep:
    """One update of a training.

    Args:
        step: The number of the update, from 1.
        lr: Its learning rate.
        loss: Its loss, before the update.
        held_out: The loss on the held-out windows after the update; `None` if it was not measured.
    """

    step: int
    lr: float
    loss: float
    held_out: float | None


@dataclass(frozen=True)
class HealLog:
    """The log of a training.

    Args:
        before: The held-out loss before the first update.
        best: The held-out loss of the weights that were kept, the lowest one measured.
        best_step: The number of the update that gave these weights; 0 if no update improved the held-out loss.
        steps: Every update, in order.
    """

    before: float
    best: float
    best_step: int
    steps: tuple[HealStep, ...]


def best_row(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The row of a training's log with the lowest held-out loss; the first of several."""
    return min((row for row in rows if row["held_out"] is not None), key=lambda row: (row["held_out"], row["step"]))


def default_lr(width: int) -> float:
    """The default peak learning rate for a replacement alone: 2e-4 x 4096 / width.

    LLM-Streamline (arXiv 2403.19135) uses 2e-4 at width 4096. Narrower layers need a rate that is higher in inverse
    proportion (measured: `docs/methods-0.1.0.md`).

    Args:
        width: The hidden size of the model.
    """
    return 2e-4 * 4096 / width


def default_model_lr(model: PreTrainedModel, stage: str) -> float:
    """The default peak learning rate for all weights, or by `local` for a layer: it follows the weights and the width.

    With `lm` it is 3e-4, LayerChop's (arXiv 2305.14864), because a small model would forget more at the rates below
    than it learns. Else it is `CHANGES[stage]` x RMS / sqrt(width), with the root mean square of the weights. An update
    of AdamW changes each weight by about the learning rate. If it changes all weights of a matrix alike, the output
    changes by the rate x width, while it is RMS x sqrt(width) large; the quotient is `CHANGES[stage]`. That rates for
    matrices fall with the width is Tensor Programs V's rule for Adam (arXiv 2203.03466, table 3).

    The numbers in `CHANGES` were measured at widths of 96 and 128 on three models, whose RMS differs by a factor of 2.6
    (`docs/methods.md`).

    Args:
        model: The original; with `lm`, any model.
        stage: `lm`, `distill` or `local`.
    """
    if stage == "lm":
        return 3e-4
    rate = CHANGES[stage] * _weight_rms(model) / math.sqrt(model.config.hidden_size)
    return float(f"{rate:.3g}")  # the same on machines that round sums differently


def _weight_rms(model: PreTrainedModel) -> float:
    """The median over the matrices of the decoder layers of their root mean square, without matrices of zeros."""
    of_layers = {id(each) for each in decoder_layers(model, architecture_of(model.config)).parameters()}
    squares = [
        _mean_square(read_parameter(model, name))
        for name, each in model.named_parameters()
        if id(each) in of_layers and each.ndim > 1 and each.is_floating_point()
    ]
    return math.sqrt(median(square for square in squares if square > 0))


@torch.no_grad()
def _mean_square(matrix: torch.Tensor) -> float:
    # Sums of many squares are inexact in fp32: one norm for each row, and the sum of these in fp64.
    rows = torch.linalg.vector_norm(matrix, dim=-1, dtype=torch.float32).double()
    return float(rows.square().mean()) / matrix.shape[-1]


def default_lora_lr(width: int, stage: str) -> float:
    """The default peak learning rate for adapters: 9e-4, or 9e-4 x sqrt(4096 / width) for distillation.

    9e-4 is three times LayerChop's rate for all weights (arXiv 2305.14864), because adapters start from nothing.

    Args:
        width: The hidden size of the model.
        stage: One of `recipe.resolved_trainings`.
    """
    return 9e-4 * math.sqrt(4096 / width) if stage == "distill" else 9e-4


def needs_original(recipe: Recipe, cached: bool) -> bool:
    """Whether trainings after the edit need the original itself, and not only outputs that it gave before.

    Args:
        recipe: The recipe.
        cached: Whether the outputs of the original are cached for distillation.
    """
    if "local" in recipe.resolved_trainings:
        return True
    # With a limit of time, the training may not reach all windows. Several processes fill the cache together. Windows
    # with replaced tokens are not cached.
    complete = cached and recipe.healing.minutes is None and process_count() == 1 and not recipe.resolved_replace
    return "distill" in recipe.resolved_trainings and not complete


def scope_of(recipe: Recipe, number: int, trained: bool) -> Scope:
    """What stage `number` of `recipe.resolved_trainings` trains: the replacement, single layers, or the whole model.

    `hidden-mse` always trains the replacement, and `local` single layers. Otherwise `heal_scope` decides. Without it, a
    first stage `lm` trains the replacement, as in LLM-Streamline (arXiv 2403.19135), and all other stages train the
    model. A single stage `lm` with `lora` trains the model too, because adapters need the model.

    Args:
        recipe: The recipe.
        number: The number of the stage in `recipe.resolved_trainings`, from 0.
        trained: Whether the plan has a trained replacement.
    """
    if recipe.resolved_trainings[number] == "hidden-mse":
        return "replacement"
    if recipe.resolved_trainings[number] == "local":
        return "layer"
    if recipe.healing.scope is not None:
        return recipe.healing.scope
    first = recipe.resolved_trainings[number] == "lm" and number == 0 and trained
    return "replacement" if first and (not recipe.healing.lora or len(recipe.resolved_trainings) > 1) else "model"


def replacement_settings(recipe: Recipe, width: int, stage: str) -> HealSettings:
    """The settings for training a replacement alone, after LLM-Streamline (arXiv 2403.19135).

    As in the authors' code, the betas are 0.9 and 0.95 with the next-token loss.

    Args:
        recipe: The recipe.
        width: The hidden size of the model.
        stage: One of `recipe.resolved_trainings`.
    """
    return HealSettings(
        lr=recipe.healing.lr or default_lr(width),
        epochs=recipe.healing.epochs,
        batch=recipe.heal_batch(stage),
        micro_batch=recipe.healing.micro_batch,
        gradient_checkpointing=recipe.healing.gradient_checkpointing,
        dtype=recipe.healing.dtype,
        optimizer=recipe.healing.optimizer,
        minutes=recipe.healing.minutes,
        replaced=recipe.resolved_replace if stage == "distill" else 0.0,
        betas=(0.9, 0.999) if stage == "hidden-mse" else (0.9, 0.95),
        seed=recipe.seed,
    )


def local_settings(recipe: Recipe, model: PreTrainedModel, layers: int) -> HealSettings:
    """The settings for training one cut layer by `local`.

    Args:
        recipe: The recipe.
        model: The original.
        layers: The number of cut layers, which share the time limit.
    """
    minutes = recipe.healing.minutes
    return HealSettings(
        lr=recipe.healing.lr or default_model_lr(model, "local"),
        epochs=recipe.healing.epochs,
        batch=recipe.heal_batch("local"),
        micro_batch=recipe.healing.micro_batch,
        dtype=recipe.healing.dtype,
        optimizer=recipe.healing.optimizer,
        minutes=None if minutes is None else minutes / layers,
        min_lr_share=0.0,
        weight_decay=0.0,
        clip=1.0,
        seed=recipe.seed,
    )


def model_settings(recipe: Recipe, model: PreTrainedModel, stage: str) -> HealSettings:
    """The settings for training a whole model, by the next-token loss or by distillation.

    With the next-token loss, the learning rate, the weight decay and the end of the cosine at a tenth of the peak are
    LayerChop's (arXiv 2305.14864). The betas, the clipping and the decay of matrices only are this program's own.
    Distillation starts from weights that are good already. So it has no weight decay, and its learning rate ends at
    zero, which leaves less noise of single batches in the weights (measured: `docs/methods-0.1.0.md`). Adapters do not
    decay, because their updates are small anyway.

    Args:
        recipe: The recipe.
        model: The original; with `lm`, any model of its width.
        stage: One of `recipe.resolved_trainings`.
    """
    lora, distils = recipe.healing.lora, stage == "distill"
    width = model.config.hidden_size
    return HealSettings(
        lr=recipe.healing.lr or (default_lora_lr(width, stage) if lora else default_model_lr(model, stage)),
        epochs=recipe.healing.epochs,
        batch=recipe.heal_batch(stage),
        micro_batch=recipe.healing.micro_batch,
        dtype=recipe.healing.dtype,
        optimizer=recipe.healing.optimizer,
        gradient_checkpointing=recipe.healing.gradient_checkpointing,
        minutes=recipe.healing.minutes,
        replaced=recipe.resolved_replace if distils else 0.0,
        min_lr_share=0.0 if distils else 0.1,
        betas=(0.9, 0.999) if distils else (0.9, 0.95),
        weight_decay=0.0 if distils or lora else 0.1,
        decay_vectors=False,
        clip=1.0,
        lora_rank=recipe.healing.lora_rank if lora else None,
        lora_base=recipe.healing.lora_base,
        seed=recipe.seed,
    )


def distillation_weights(recipe: Recipe) -> tuple[float, float]:
    """The weights of the KL divergence and of the hidden-state error in distillation (`losses.Distillation`).

    By default the KL divergence has the whole weight: from the cross-entropy the model would learn a text by heart that
    it reads several times (measured: `docs/methods-0.1.0.md`). In a long training that replaces tokens, the
    cross-entropy has a part (measured: `docs/methods.md`). CoMe's weight of the hidden-state error is not published;
    the default is this program's own, for all methods.

    Args:
        recipe: The recipe.
    """
    hidden = recipe.healing.hidden
    return recipe.resolved_kl, 10.0 if hidden is None else hidden


def held_out_windows(windows: int) -> int:
    """How many of the windows of the healing text are held out."""
    return max(1, round(windows * HELD_OUT_SHARE))


def heal_windows(tokens: int, length: int) -> int:
    """The number of windows of `length` tokens in `tokens` tokens, with the held-out windows.

    Raises:
        StreamlineError: there are fewer than two, one to train on and one to hold out.
    """
    if tokens < 2 * length:
        raise StreamlineError(f"heal-tokens {tokens}: must be at least two windows of {length} tokens, {2 * length}")
    return tokens // length
