"""The losses that healing minimises: next-token, distillation, and hidden-state error. Each is a mean over tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from optimum.streamline.editing.residual_stream import final_stream
from optimum.streamline.errors import StreamlineError
from optimum.streamline.models.architectures import architecture_of, decoder_layers, layer_output
from optimum.streamline.models.removed_sublayers import without
from optimum.streamline.text.windows import LOGITS

IGNORED = -100
"""In the place of a token that no token follows."""

Loss = Callable[[torch.Tensor], torch.Tensor]
"""A function from token ids `[windows, length]` to a loss, a scalar, the mean over their tokens."""


class NotFiniteError(StreamlineError):
    """The loss of a training is not finite. A resumed training would fail again, so its checkpoints are deleted."""


LayerOutputs = dict[int, torch.Tensor]
"""The raw outputs `[windows, length, width]` of layers, before any final norm, by layer number."""


class Target(Protocol):
    """The next-token distributions of the original, or what is known of them."""

    def divergence(self, logits: torch.Tensor) -> torch.Tensor:
        """KL(original || model) in nats per token, the mean over all tokens: a scalar with gradient.

        Args:
            logits: The model's logits `[windows, length, vocabulary]`.
        """

    def part(self, tokens: slice) -> Target:
        """The distributions of some tokens, numbered over all windows, as one window."""


@dataclass(frozen=True)
class AllLogits:
    """All logits `[windows, length, vocabulary]` of the original, so that the divergence is exact."""

    logits: torch.Tensor

    def divergence(self, logits: torch.Tensor) -> torch.Tensor:
        """As `Target.divergence`."""
        log_target, log_model = self.logits.log_softmax(-1).flatten(0, 1), logits.log_softmax(-1).flatten(0, 1)
        return nn.functional.kl_div(log_model, log_target, reduction="batchmean", log_target=True)

    def part(self, tokens: slice) -> Target:
        """As `Target.part`."""
        return AllLogits(self.logits.flatten(0, 1)[None, tokens])


@dataclass(frozen=True)
class TopTokens:
    """The most probable tokens of each distribution. All other tokens count as one.

    The divergence is between distributions over these tokens and the rest, so it is never larger than the exact
    one. It tells nothing about the tokens of the rest.

    Args:
        tokens: Token ids `[windows, length, tokens]`.
        log_probabilities: Their log-probabilities, of the same shape, in nats.
    """

    tokens: torch.Tensor
    log_probabilities: torch.Tensor

    def divergence(self, logits: torch.Tensor) -> torch.Tensor:
        """As `Target.divergence`."""
        whole = logits.logsumexp(-1)
        named = self._terms(self.log_probabilities, logits.gather(-1, self.tokens) - whole[..., None]).sum(-1)
        rest = (1 - self.log_probabilities.exp().sum(-1)).clamp(min=0)
        others = logits.scatter(-1, self.tokens, -torch.inf).logsumexp(-1) - whole
        return (named + self._terms(rest.log(), others)).mean()

    def part(self, tokens: slice) -> Target:
        """As `Target.part`."""
        return TopTokens(*(each.flatten(0, 1)[None, tokens] for each in (self.tokens, self.log_probabilities)))

    @staticmethod
    def _terms(log_target: torch.Tensor, log_model: torch.Tensor) -> torch.Tensor:
        # A probability of zero adds zero. Its logarithm would make the gradient nan, so it is replaced first.
        zero = log_target.isneginf()
        return log_target.exp() * (log_target.masked_fill(zero, 0) - log_model.masked_fill(zero, 0))


@dataclass(frozen=True)
class SampledTokens:
    """Tokens drawn from each distribution with replacement, which estimate the divergence without bias.

    Source: random sampling distillation (Anshumann et al., arXiv 2503.16870).

    Args:
        tokens: Token ids `[windows, length, draws]`.
        entropy: The entropy of each distribution `[windows, length]`, in nats.
    """

    tokens: torch.Tensor
    entropy: torch.Tensor

    def divergence(self, logits: torch.Tensor) -> torch.Tensor:
        """As `Target.divergence`; single values can be below zero."""
        drawn = logits.gather(-1, self.tokens) - logits.logsumexp(-1, keepdim=True)
        return (-drawn.mean(-1) - self.entropy).mean()

    def part(self, tokens: slice) -> Target:
        """As `Target.part`."""
        return SampledTokens(*(each.flatten(0, 1)[None, tokens] for each in (self.tokens, self.entropy)))


def logits_of(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """The logits `[windows, length, vocabulary]` of token ids `[windows, length]`, in fp32."""
    logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return logits.float()


@contextmanager
def layer_outputs(model: PreTrainedModel, numbers: Sequence[int]) -> Iterator[LayerOutputs]:
    """Yield a dictionary that a forward pass in the block fills with the raw outputs of layers `numbers`."""
    outputs: LayerOutputs = {}
    layers = decoder_layers(model, architecture_of(model.config))

    def keep(number: int) -> Callable[..., None]:
        return lambda _, args, output: outputs.update({number: layer_output(output)})

    with ExitStack() as hooks:
        for number in dict.fromkeys(numbers):
            hooks.enter_context(layers[number].register_forward_hook(keep(number)))
        yield outputs


@torch.no_grad()
def outputs_of(model: PreTrainedModel, ids: torch.Tensor, numbers: Sequence[int]) -> tuple[Target, LayerOutputs]:
    """The distributions of token ids `[windows, length]`, and the outputs of layers `numbers`."""
    with layer_outputs(model, numbers) as states:
        return AllLogits(logits_of(model, ids)), states


Outputs = Callable[[torch.Tensor, Sequence[int]], tuple[Target, LayerOutputs]]
"""A function as `outputs_of` for one model."""


class HealingLoss(Protocol):
    """A loss of a whole model."""

    def loss(self, model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
        """The loss of `model` on token ids `[windows, length]`: a scalar, ready for `backward`."""


@dataclass(frozen=True)
class NextToken:
    """The next-token cross-entropy -1/N sum_t log p(x_{t+1} | x_1..x_t), in nats."""

    def loss(self, model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
        """The mean over all tokens but the first of each window, from logits in fp32."""
        return logit_loss(model, ids, cross_entropy=1.0)


@dataclass(frozen=True)
class Distillation:
    """Distillation of the original into the pruned model: a KL + (1 - a) CE + b H.

    - KL = KL(original || model) of the next-token distributions, in nats.
    - CE is the next-token cross-entropy (`NextToken`), in nats.
    - H = mean over layers k of E[|s_k - t_k|^2 / |t_k|^2]. s_k is the raw output of layer k of the model. t_k is the
      original's hidden state h_{depths[k]}, before any final norm.

    Source: the hierarchical distillation of CoMe (arXiv 2510.15304).

    Deviation: the squared error of each token is divided by the squared norm of its target. The paper seems to use the
    plain mean squared error. A few tokens with massive activations, such as the first of a window, would dominate that.

    Args:
        outputs: The function that gives the original's outputs: `outputs_of`, or a cache's. Without gradients.
        depths: `Plan.depths`: for each layer of the model, the index of the original hidden state to match.
        kl: a, the weight of the KL divergence, 0 to 1.
        hidden: b, the weight of the hidden-state error.
    """

    outputs: Outputs
    depths: tuple[int, ...]
    kl: float = 1.0
    hidden: float = 0.0

    def loss(self, model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
        """The weighted sum of the three terms. A term whose weight is zero is not computed."""
        layers = range(len(self.depths)) if self.hidden else ()
        target, targets = self.outputs(ids, [self.depths[k] - 1 for k in layers])
        with layer_outputs(model, layers) as states:
            loss = logit_loss(model, ids, target, self.kl, 1 - self.kl)
        if self.hidden:
            errors = [relative_error(states[k], targets[self.depths[k] - 1]) for k in layers]
            loss = loss + self.hidden * torch.stack(errors).mean()
        return loss


@torch.no_grad()
def window_divergences(original: PreTrainedModel, model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """KL(original || model) of the next-token distributions, the mean over each window.

    Args:
        original: The original, in evaluation mode.
        model: The other model, in evaluation mode.
        ids: Token ids `[windows, length]`.

    Returns:
        `[windows]`, float64, in nats per token, on the CPU.
    """
    ids = ids.to(model.device)
    parts = [logits_in_parts(each, ids) for each in (original, model)]
    means = torch.zeros(len(ids), dtype=torch.float64)
    for one, other in zip(*parts, strict=True):
        share = one.logits.shape[1] / ids.shape[1]
        means[one.window] += share * AllLogits(one.logits).divergence(other.logits).double().cpu()
    return means


@dataclass(frozen=True)
class LogitPart:
    """Logits `[1, tokens, vocabulary]` of some tokens of a window."""

    window: int
    logits: torch.Tensor


def logits_in_parts(model: PreTrainedModel, ids: torch.Tensor) -> Iterator[LogitPart]:
    """The logits of token ids `[windows, length]`, part by part; whole windows if there are at most `LOGITS` in all."""
    vocabulary = model.config.get_text_config().vocab_size
    if ids.numel() * vocabulary <= LOGITS:
        yield from (LogitPart(window, logits[None]) for window, logits in enumerate(logits_of(model, ids)))
        return
    for window, stream in enumerate(final_stream(model, ids)):
        for tokens in torch.arange(ids.shape[1]).split(_tokens_at_once(vocabulary, ids.shape[1])):
            part = slice(int(tokens[0]), int(tokens[-1]) + 1)
            with without(model, frozenset(), model.config.num_hidden_layers, stream[None, part]):
                yield LogitPart(window, logits_of(model, ids[window : window + 1, part]))


def _tokens_at_once(vocabulary: int, length: int) -> int:
    """For how many tokens logits are computed at a time; no more than a window, whose positions the model knows."""
    return max(1, min(LOGITS // vocabulary, length))


def relative_error(states: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The mean over tokens of |s - t|^2 / |t|^2.

    Args:
        states: s, hidden states `[windows, length, width]`.
        target: t, hidden states of the same shape.
    """
    states, target = states.float(), target.float()
    return ((states - target).square().sum(-1) / target.square().sum(-1)).mean()


def logit_loss(
    model: PreTrainedModel,
    ids: torch.Tensor,
    target: Target | None = None,
    divergence: float = 0.0,
    cross_entropy: float = 0.0,
) -> torch.Tensor:
    """The weighted sum of a divergence and the next-token cross-entropy. A term whose weight is zero is not computed.

    Where there are more than `LOGITS` logits, the model's final norm and head run for some tokens at a time, and again
    for the gradient.

    Args:
        model: The model.
        ids: Token ids `[windows, length]`.
        target: The distributions that the divergence is from; `None` if its weight is zero.
        divergence: The weight of `Target.divergence`.
        cross_entropy: The weight of the mean cross-entropy over all tokens but the first of each window.

    Returns:
        A scalar in nats per token, with gradient.
    """
    following = ids.roll(-1, dims=1)
    following[:, -1] = IGNORED

    def of_tokens(logits: torch.Tensor, tokens: slice) -> torch.Tensor:
        loss = logits.new_zeros(())
        if target is not None and divergence:
            loss = loss + divergence * logits.shape[1] / ids.numel() * target.part(tokens).divergence(logits)
        if cross_entropy:
            summed = nn.functional.cross_entropy(
                logits[0], following.flatten()[tokens], ignore_index=IGNORED, reduction="sum"
            )
            loss = loss + cross_entropy * summed / ids[:, 1:].numel()
        return loss

    vocabulary = model.config.get_text_config().vocab_size
    if ids.numel() * vocabulary <= LOGITS:
        return of_tokens(logits_of(model, ids).flatten(0, 1)[None], slice(None))
    stream, at_once = final_stream(model, ids), _tokens_at_once(vocabulary, ids.shape[1])

    def of_part(stream: torch.Tensor, start: int) -> torch.Tensor:
        tokens = slice(start, start + stream.shape[1])
        with without(model, frozenset(), model.config.num_hidden_layers, stream):
            return of_tokens(logits_of(model, ids.flatten()[None, tokens]), tokens)

    parts = stream.flatten(0, 1)[None].split(at_once, dim=1)
    losses = [
        checkpoint(of_part, part, number * at_once, use_reentrant=False, preserve_rng_state=False)
        for number, part in enumerate(parts)
    ]
    return torch.stack(losses).sum()


class _StopForward(Exception):
    """Ends a forward pass after the block of layers, because later layers are not needed."""


class BlockOutput:
    """The error of a replacement's output against the output of the block that it replaces, for the same input.

    For a block of layers j to j + n - 1, the input is the original's h_j and the target is its h_{j+n}. One forward
    pass of the original, which stops after the block, gives both.

    Source: the training of the replacement layer in LLM-Streamline (arXiv 2403.19135).

    Args:
        model: The original.
        block: Numbers of the block's layers, in rising order.
        normalised: Divide the squared error of each token by the squared norm of its target, so that a few tokens of
            very large norm do not dominate. This is not in the paper.
    """

    def __init__(self, model: PreTrainedModel, block: tuple[int, ...], normalised: bool = False) -> None:
        layers = decoder_layers(model, architecture_of(model.config))
        self._model, self._normalised = model, normalised
        self._first, self._last = layers[block[0]], layers[block[-1]]

    def loss(self, student: nn.Module, ids: torch.Tensor) -> torch.Tensor:
        """The loss of the replacement `student` on token ids `[windows, length]`.

        It is the mean squared error over tokens and width, or `relative_error` if `normalised`.
        """
        with torch.no_grad():
            args, kwargs, target = self._run(ids)
        output = layer_output(student(*args, **kwargs))
        return relative_error(output, target) if self._normalised else nn.functional.mse_loss(output, target)

    def _run(self, ids: torch.Tensor) -> tuple[tuple[Any, ...], dict[str, Any], torch.Tensor]:
        # The arguments of the block's first layer, and the output of its last layer.
        captured: dict[str, Any] = {}
        with _captured(self._first, self._last, captured), suppress(_StopForward):
            self._model.base_model(ids, use_cache=False)
        return captured["args"], captured["kwargs"], captured["output"]


@contextmanager
def _captured(first: nn.Module, last: nn.Module, captured: dict[str, Any]) -> Iterator[None]:
    def before_first(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        captured.update(args=args, kwargs=kwargs)

    def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        captured["output"] = layer_output(output)
        raise _StopForward

    hooks = [
        first.register_forward_pre_hook(before_first, with_kwargs=True),
        last.register_forward_hook(after),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
