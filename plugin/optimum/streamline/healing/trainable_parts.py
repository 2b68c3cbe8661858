"""The two trainings there are, in memory: of a replacement apart from its model, and of a model or a part of it.

They say which weights are trained and to what; the loop is the engine's. Knows no recipe and no file but checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel

from optimum.streamline.editing.plan import Plan
from optimum.streamline.models.skipped_sublayers import skipped_sublayers_dropped
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
    """Train `student`, in place, to put out what its block puts out: `BlockOutput`, without dropout.

    The last windows are held out; the weights that do best on them are the ones kept.

    Args:
        model: The original, which stays as it is.
        student: The replacement's layer.
        windows: `heal_windows` of them.
        normalised: As `BlockOutput` says.
        workspace: As `trainer.train` says.

    Raises:
        StreamlineError: as `trainer.train`.
    """
    goal = BlockOutput(model.eval(), plan.removed, normalised)
    student.requires_grad_(True).eval()
    loss = partial(goal.loss, student)
    title = "training the replacement"
    log = train(list(student.parameters()), loss, windows, settings, title=title, workspace=workspace)
    student.requires_grad_(False)
    return log


def train_model(
    model: PreTrainedModel,
    goal: HealingLoss,
    windows: Windows,
    settings: HealSettings,
    *,
    part: nn.Module | None = None,
    share: tuple[int, int] = (0, 1),
    workspace: Path | None = None,
) -> HealLog:
    """Train `model`, in place, to `goal`, without dropout; a model with adapters comes out as a plain one.

    Skipped sublayers are neither computed nor trained: their zeros stay zeros. The last windows are held out; the
    weights that do best on them are the ones kept.

    Args:
        windows: `heal_windows` of them.
        part: The one submodule of `model` to train, through the rest; all weights by default.
        share: As `trainer.train` says.
        workspace: As `trainer.train` says.

    Raises:
        StreamlineError: as `trainer.train`.
    """
    model.eval()
    with ExitStack() as stack:
        stack.enter_context(skipped_sublayers_dropped(model))
        stack.enter_context(_gradients_as_before(model))
        model.requires_grad_(False)
        if settings.lora_rank is None:
            parameters: Sequence[nn.Parameter] = list((part or model).parameters())
            for parameter in parameters:
                parameter.requires_grad_(True)
        else:
            parameters = stack.enter_context(adapters(model, settings.lora_rank, settings.seed))
        loss = partial(goal.loss, model)
        title = "training the model" if part is None else "training the replacement"
        return train(parameters, loss, windows, settings, title=title, share=share, workspace=workspace)


@contextmanager
def _gradients_as_before(model: nn.Module) -> Iterator[None]:
    """Ask for gradients afterwards where they were asked for before, and keep none."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, required in before:
            parameter.requires_grad_(required)
            parameter.grad = None
