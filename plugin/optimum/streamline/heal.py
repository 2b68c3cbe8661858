"""Training a replacement to do what its block did: hidden-state regression, teacher and student in one pass.

Hidden states are made, used and dropped batch by batch, never kept. This file neither builds the replacement
nor puts it into the model.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, get_cosine_with_min_lr_schedule_with_warmup

from .anatomy import architecture_of, decoder_layers, layer_output
from .errors import StreamlineError
from .plan import Plan
from .progress import progress_bar
from .windows import Windows

HELD_OUT_SHARE = 0.05
EVALUATIONS = 10


@dataclass(frozen=True)
class HealSettings:
    """How a replacement is trained. Decay, clipping and the cosine's end are LLM-Streamline's (arXiv 2403.19135).

    Args:
        lr: Peak learning rate, such as `default_lr`; the cosine ends at `min_lr_share` of it.
        epochs: Passes over the training windows.
        batch: Windows an update.
        warmup_share: Share of the updates that raise the rate from zero.
        clip: Largest gradient norm.
        seed: Of the order of the windows.
    """

    lr: float
    epochs: int = 4
    batch: int = 8
    min_lr_share: float = 0.25
    warmup_share: float = 0.05
    weight_decay: float = 1e-3
    clip: float = 5.0
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
    """The peak learning rate for a model of hidden size `width`: LLM-Streamline's 2e-4 at its models' width, 4096.

    A layer of smaller width takes, and needs, a rate as many times higher (measured: `docs/methods.md`).
    """
    return 2e-4 * 4096 / width


def heal_windows(tokens: int, length: int) -> int:
    """How many windows `tokens` tokens are, the held-out ones among them.

    Raises:
        StreamlineError: too few to train on some and hold out one.
    """
    if tokens < 2 * length:
        raise StreamlineError(f"heal-tokens {tokens}: must be at least two windows of {length} tokens, {2 * length}")
    return tokens // length


def train_replacement(
    model: PreTrainedModel, plan: Plan, student: nn.Module, windows: Windows, settings: HealSettings
) -> HealLog:
    """Train `student`, in place, on the mean squared error to the hidden states its block puts out.

    Layer replacement of LLM-Streamline, arXiv 2403.19135: the input is h_j, the target h_{j+n}, n the length of the
    block. Dropout is off for both. The last windows are held out; the weights that do best on them are the ones kept.

    Args:
        model: The original, which stays as it is.
        student: The replacement's layer.
        windows: `heal_windows` of them.

    Raises:
        StreamlineError: the loss is not finite.
    """
    block = _Block(model, plan.gone)
    count = max(1, round(len(windows.ids) * HELD_OUT_SHARE))
    training, held_out = windows.ids[:-count], windows.ids[-count:]
    student.requires_grad_(True).eval()
    optimizer = torch.optim.AdamW(student.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
    updates = settings.epochs * -(-len(training) // settings.batch)
    schedule = _schedule(optimizer, updates, settings)
    before = _held_out_loss(block, student, held_out, settings.batch)
    best, best_step, best_weights = before, 0, copy.deepcopy(student.state_dict())
    steps: list[HealStep] = []
    with progress_bar("training the replacement", updates) as bar:
        for step, batch in enumerate(_shuffled(training, settings), start=1):
            rate = float(schedule.get_last_lr()[0])
            loss = block.loss(student, batch)
            if not bool(loss.isfinite()):
                raise StreamlineError(f"heal-lr {settings.lr}: the loss is no longer finite at update {step}; try less")
            loss.backward()
            measured_loss = loss.item()
            nn.utils.clip_grad_norm_(student.parameters(), settings.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
            measured = None
            if step == updates or step % max(1, updates // EVALUATIONS) == 0:
                measured = _held_out_loss(block, student, held_out, settings.batch)
                if measured < best:
                    # A copy: the state dict itself is a view that the next update would change.
                    best, best_step, best_weights = measured, step, copy.deepcopy(student.state_dict())
            steps.append(HealStep(step, rate, measured_loss, measured))
            bar.advance(note=f"loss {measured_loss:.4g}, held out {best:.4g}")
    student.load_state_dict(best_weights)
    student.requires_grad_(False)
    return HealLog(before, best, best_step, tuple(steps))


def _schedule(optimizer: torch.optim.Optimizer, updates: int, settings: HealSettings) -> LambdaLR:
    # Updates count from 1, the schedule from 0, where its rate is zero: it starts one on, so that the first update
    # moves and the last one, number `updates`, is where the cosine ends.
    for group in optimizer.param_groups:
        group["initial_lr"] = settings.lr
    schedule: LambdaLR = get_cosine_with_min_lr_schedule_with_warmup(
        optimizer,
        num_warmup_steps=round(updates * settings.warmup_share),
        num_training_steps=updates,
        min_lr_rate=settings.min_lr_share,
        last_epoch=0,
    )
    return schedule


def _shuffled(training: torch.Tensor, settings: HealSettings) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(settings.seed)
    for _ in range(settings.epochs):
        yield from training[torch.randperm(len(training), generator=generator)].split(settings.batch)


@torch.no_grad()
def _held_out_loss(block: _Block, student: nn.Module, held_out: torch.Tensor, batch: int) -> float:
    total = sum(float(block.loss(student, rows)) * len(rows) for rows in held_out.split(batch))
    return total / len(held_out)


class _StopForward(Exception):
    """Ends a forward pass once the block is through: what comes after it is not needed."""


class _Block:
    """The block that is replaced, seen from outside: what goes in and what comes out."""

    def __init__(self, model: PreTrainedModel, gone: tuple[int, ...]) -> None:
        layers = decoder_layers(model, architecture_of(model.config))
        self._model = model
        self._first, self._last = layers[gone[0]], layers[gone[-1]]

    def loss(self, student: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        """Mean squared error over tokens and width between the student's output and the block's."""
        with torch.no_grad():
            args, kwargs, target = self._run(batch.to(self._model.device))
        return nn.functional.mse_loss(layer_output(student(*args, **kwargs)), target)

    def _run(self, batch: torch.Tensor) -> tuple[tuple[Any, ...], dict[str, Any], torch.Tensor]:
        seen: dict[str, Any] = {}
        with _captured(self._first, self._last, seen), suppress(_StopForward):
            self._model.base_model(batch, use_cache=False)
        return seen["args"], seen["kwargs"], seen["output"]


@contextmanager
def _captured(first: nn.Module, last: nn.Module, seen: dict[str, Any]) -> Iterator[None]:
    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.update(args=args, kwargs=kwargs)

    def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        seen["output"] = layer_output(output)
        raise _StopForward

    hooks = [first.register_forward_pre_hook(before, with_kwargs=True), last.register_forward_hook(after)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
