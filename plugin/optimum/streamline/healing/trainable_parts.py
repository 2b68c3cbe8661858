"""The two kinds of training: a replacement on its own, and a model or one submodule of it.

Both choose the parameters and the loss, and then call `trainer.train`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from optimum.streamline.checkpoints.loading import DTYPES
from optimum.streamline.editing.plan import Plan
from optimum.streamline.models.architectures import architecture_of, decoder_layers
from optimum.streamline.models.sharded_weights import sharded_copy, write_back
from optimum.streamline.models.skipped_sublayers import skipped_sublayers_dropped
from optimum.streamline.quantization.compact_copy import compact_copy
from optimum.streamline.system.distributed import sharding
from optimum.streamline.text.windows import Windows

from .lora import adapters
from .losses import BlockOutput, HealingLoss
from .settings import HealLog, HealSettings
from .trainer import train


def train_replacement(
    model: PreTrainedModel,
    plan: Plan,
    student: nn.Module,
    windows: Windows,
    settings: HealSettings,
    *,
    normalised: bool = False,
    workspace: Path | None = None,
) -> HealLog:
    """Train a replacement, in place, to give the output of the block that it replaces (`losses.BlockOutput`).

    There is no dropout. The weights with the lowest loss on the held-out windows are kept.

    Args:
        model: The original; it is unchanged.
        plan: The plan, whose `removed` layers are the block.
        student: The layer of the replacement.
        windows: The healing text, `settings.heal_windows` windows.
        settings: The settings of the training.
        normalised: See `losses.BlockOutput`.
        workspace: See `trainer.train`.

    Returns:
        The log of the training.

    Raises:
        StreamlineError: as `trainer.train`.
    """
    block_output = BlockOutput(model.eval(), plan.removed, normalised)
    student.requires_grad_(True).eval()
    loss = partial(block_output.loss, student)
    title = "training the replacement"
    log = train(list(student.parameters()), loss, windows, settings, title=title, workspace=workspace)
    student.requires_grad_(False)
    return log


def train_model(
    model: PreTrainedModel,
    healing_loss: HealingLoss,
    windows: Windows,
    settings: HealSettings,
    *,
    part: nn.Module | None = None,
    title: str = "training the model",
    share: tuple[int, int] = (0, 1),
    workspace: Path | None = None,
    stop_at: float = 1.0,
    versions: torch.Tensor | None = None,
    device: str = "cpu",
) -> HealLog:
    """Train a model or one of its submodules, in place, to minimise `healing_loss`.

    There is no dropout. The weights with the lowest loss on the held-out windows are kept. Skipped sublayers are
    neither computed nor trained, so their output stays zero. Adapters are merged into the weights at the end.

    Args:
        model: The model.
        healing_loss: The loss to minimise.
        windows: The healing text, `settings.heal_windows` windows.
        settings: The settings of the training.
        part: The submodule of `model` to train; the whole model by default.
        title: The title of the progress bar.
        share: See `trainer.train`.
        workspace: See `trainer.train`.
        stop_at: See `trainer.train`.
        versions: See `trainer.train`.
        device: The device of a copy that is trained in place of the model, `cpu` or `cuda`: of shared weights, or a
            compact one under adapters.

    Returns:
        The log of the training.

    Raises:
        StreamlineError: as `trainer.train`.
    """
    model.eval()
    with ExitStack() as stack:
        stack.enter_context(skipped_sublayers_dropped(model))
        stack.enter_context(_gradients_as_before(model))
        shards = sharding() if part is None else None
        if shards is not None:
            model = stack.enter_context(_sharded(model, settings, device, shards.frees_layers))
        if settings.gradient_checkpointing or (shards is not None and shards.checkpoints):
            stack.enter_context(_layers_computed_again(model))
        model.requires_grad_(False)
        if settings.lora_rank is None:
            parameters: Sequence[nn.Parameter] = list((part or model).parameters())
            for parameter in parameters:
                parameter.requires_grad_(True)
        else:
            onto = None
            if settings.lora_base != "fp32":
                onto, model = model, compact_copy(model, settings.lora_base, device)
            parameters = stack.enter_context(adapters(model, settings.lora_rank, settings.seed, onto))
        loss = partial(healing_loss.loss, model)
        return train(
            parameters,
            loss,
            windows,
            settings,
            title=title,
            share=share,
            workspace=workspace,
            stop_at=stop_at,
            versions=versions,
        )


@contextmanager
def _sharded(
    model: PreTrainedModel, settings: HealSettings, device: str, frees_layers: bool
) -> Iterator[PreTrainedModel]:
    """A copy of a model whose weights the processes share; after the `with` block `model` has its weights."""
    shared = sharded_copy(model, device, DTYPES[settings.dtype], frees_layers)
    yield shared
    write_back(shared, model)


@contextmanager
def _gradients_as_before(model: nn.Module) -> Iterator[None]:
    """Restore `requires_grad` of every parameter after the `with` block, and free the gradients."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, required in before:
            parameter.requires_grad_(required)
            parameter.grad = None


@contextmanager
def _layers_computed_again(model: PreTrainedModel) -> Iterator[None]:
    """Let the backward pass compute each decoder layer again inside the `with` block (gradient checkpointing).

    The switch of transformers does this in training mode only, which would also turn dropout on.
    """
    layers = list(decoder_layers(model, architecture_of(model.config)))
    try:
        for layer in layers:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
        yield
    finally:
        for layer in layers:
            del layer.forward
