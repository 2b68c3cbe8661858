"""What a training brings down: the losses, each a mean over the tokens of a batch. Updates no weight."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from transformers import PreTrainedModel

from optimum.streamline.models.architectures import architecture_of, decoder_layers, layer_output


class HealingLoss(Protocol):
    """What a model is trained to."""

    def loss(self, model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
        """The loss of `model` on token ids `[windows, length]`: a scalar, with its graph."""


@dataclass(frozen=True)
class NextToken:
    """Cross-entropy of the next token, nats: -1/N sum log p(x_{t+1} | x_1..x_t)."""

    def loss(self, model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
        """Mean over all tokens but each window's first, from logits in fp32."""
        return _cross_entropy(_logits(model, ids), ids)


@dataclass(frozen=True)
class Distillation:
    """The original's logits, and its hidden states layer by layer: a KL + (1 - a) CE + b H.

    KL is KL(original || model), nats, and H = mean_k E[|s_k - t|^2 / |t|^2], s_k the raw output of the model's layer k
    and t = h_{depths[k]} of the original, before any final norm: hierarchical distillation of CoMe (arXiv 2510.15304).

    Deviation: each token's squared error is divided by its target's squared norm, where the paper's, as far as it could
    be read, is the plain mean squared error: in that a few tokens of massive activation, such as the first of a window,
    would decide alone.

    Args:
        teacher: The original: used in evaluation mode, without gradients.
        depths: `Plan.depths`: for each of the model's layers, how many original layers its output stands for.
        kl: a.
        hidden: b.
    """

    teacher: PreTrainedModel
    depths: tuple[int, ...]
    kl: float = 1.0
    hidden: float = 0.0

    def __post_init__(self) -> None:
        self.teacher.eval()

    def loss(self, model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
        """The weighted sum of the three; a part whose weight is zero is not computed."""
        outputs = range(len(self.depths)) if self.hidden else ()
        with torch.no_grad(), _outputs_of(self.teacher, [self.depths[k] - 1 for k in outputs]) as wanted:
            target = _logits(self.teacher, ids)
        with _outputs_of(model, outputs) as states:
            logits = _logits(model, ids)
        loss = logits.new_zeros(())
        if self.kl:
            loss = loss + self.kl * _kl_divergence(target, logits)
        if self.kl != 1:
            loss = loss + (1 - self.kl) * _cross_entropy(logits, ids)
        if self.hidden:
            errors = [relative_error(states[k], wanted[self.depths[k] - 1]) for k in outputs]
            loss = loss + self.hidden * torch.stack(errors).mean()
        return loss


def relative_error(states: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean over tokens of |s - t|^2 / |t|^2, for hidden states s and t `[windows, length, width]`."""
    states, target = states.float(), target.float()
    return ((states - target).square().sum(-1) / target.square().sum(-1)).mean()


def _logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return logits.float()


def _cross_entropy(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def _kl_divergence(target: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    log_target, log_model = target.log_softmax(-1).flatten(0, 1), logits.log_softmax(-1).flatten(0, 1)
    return nn.functional.kl_div(log_model, log_target, reduction="batchmean", log_target=True)


@contextmanager
def _outputs_of(model: PreTrainedModel, numbers: Sequence[int]) -> Iterator[dict[int, torch.Tensor]]:
    """The raw outputs of these layers of `model`, by number, as a forward pass inside the block makes them."""
    outputs: dict[int, torch.Tensor] = {}
    layers = decoder_layers(model, architecture_of(model.config))

    def keep(number: int) -> Callable[..., None]:
        return lambda _, args, output: outputs.update({number: layer_output(output)})

    hooks = [layers[number].register_forward_hook(keep(number)) for number in dict.fromkeys(numbers)]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


class _StopForward(Exception):
    """Ends a forward pass once the block is through: what comes after it is not needed."""


class BlockOutput:
    """What a block puts out, given what goes into it: layer replacement of LLM-Streamline, arXiv 2403.19135.

    The input is h_j, the target h_{j+n}, n the length of the block; teacher and student see them in one pass, and the
    rest of the model is not run.

    Args:
        model: The original.
        gone: The block's layers.
        normalised: Divide each token's squared error by its target's squared norm, so that the few tokens of huge
            norm do not decide alone.
    """

    def __init__(self, model: PreTrainedModel, gone: tuple[int, ...], normalised: bool = False) -> None:
        layers = decoder_layers(model, architecture_of(model.config))
        self._model, self._normalised = model, normalised
        self._first, self._last = layers[gone[0]], layers[gone[-1]]

    def loss(self, student: nn.Module, ids: torch.Tensor) -> torch.Tensor:
        """Mean squared error over tokens and width between the student's output and the block's, or relative error."""
        with torch.no_grad():
            args, kwargs, target = self._run(ids)
        output = layer_output(student(*args, **kwargs))
        return relative_error(output, target) if self._normalised else nn.functional.mse_loss(output, target)

    def _run(self, ids: torch.Tensor) -> tuple[tuple[Any, ...], dict[str, Any], torch.Tensor]:
        seen: dict[str, Any] = {}
        with _captured(self._first, self._last, seen), suppress(_StopForward):
            self._model.base_model(ids, use_cache=False)
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
