"""The losses that healing minimises: next-token, distillation, and hidden-state error. Each is a mean over tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from transformers import PreTrainedModel

from optimum.streamline.errors import StreamlineError
from optimum.streamline.models.architectures import architecture_of, decoder_layers, layer_output

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


@dataclass(frozen=True)
class AllLogits:
    """All logits `[windows, length, vocabulary]` of the original, so that the divergence is exact."""

    logits: torch.Tensor

    def divergence(self, logits: torch.Tensor) -> torch.Tensor:
        """As `Target.divergence`."""
        log_target, log_model = self.logits.log_softmax(-1).flatten(0, 1), logits.log_softmax(-1).flatten(0, 1)
        return nn.functional.kl_div(log_model, log_target, reduction="batchmean", log_target=True)


@dataclass(frozen=True)
class TopTokens:
    """The most probable tokens of each distribution. All other tokens count as one.

    The divergence is that of the distributions over these tokens and the rest, which is never larger than the exact
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


Outputs = Callable[[PreTrainedModel, torch.Tensor, Sequence[int]], tuple[Target, LayerOutputs]]
"""A function as `outputs_of`."""


class HealingLoss(Protocol):
    """A loss of a whole model."""

    def loss(self, model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
        """The loss of `model` on token ids `[windows, length]`: a scalar, ready for `backward`."""


@dataclass(frozen=True)
class NextToken:
    """The next-token cross-entropy -1/N sum_t log p(x_{t+1} | x_1..x_t), in nats."""

    def loss(self, model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
        """The mean over all tokens but the first of each window, from logits in fp32."""
        return _cross_entropy(logits_of(model, ids), ids)


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
        teacher: The original. It runs in evaluation mode, without gradients.
        depths: `Plan.depths`: for each layer of the model, the index of the original hidden state to match.
        kl: a, the weight of the KL divergence, 0 to 1.
        hidden: b, the weight of the hidden-state error.
        outputs: The function that gives the original's outputs: `outputs_of`, or that of a cache.
    """

    teacher: PreTrainedModel
    depths: tuple[int, ...]
    kl: float = 1.0
    hidden: float = 0.0
    outputs: Outputs = outputs_of

    def __post_init__(self) -> None:
        self.teacher.eval()

    def loss(self, model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
        """The weighted sum of the three terms. A term whose weight is zero is not computed."""
        layers = range(len(self.depths)) if self.hidden else ()
        target, targets = self.outputs(self.teacher, ids, [self.depths[k] - 1 for k in layers])
        with layer_outputs(model, layers) as states:
            logits = logits_of(model, ids)
        loss = logits.new_zeros(())
        if self.kl:
            loss = loss + self.kl * target.divergence(logits)
        if self.kl != 1:
            loss = loss + (1 - self.kl) * _cross_entropy(logits, ids)
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
    pairs = zip(logits_of(original, ids), logits_of(model, ids), strict=True)
    return torch.stack([AllLogits(one[None]).divergence(other[None]) for one, other in pairs]).double().cpu()


def relative_error(states: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The mean over tokens of |s - t|^2 / |t|^2.

    Args:
        states: s, hidden states `[windows, length, width]`.
        target: t, hidden states of the same shape.
    """
    states, target = states.float(), target.float()
    return ((states - target).square().sum(-1) / target.square().sum(-1)).mean()


def _cross_entropy(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


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
        attention: Number of the layer of the block whose mask and positions the replacement gets; by default the first.
    """

    def __init__(
        self, model: PreTrainedModel, block: tuple[int, ...], normalised: bool = False, attention: int | None = None
    ) -> None:
        layers = decoder_layers(model, architecture_of(model.config))
        self._model, self._normalised = model, normalised
        self._first, self._last = layers[block[0]], layers[block[-1]]
        self._attention = layers[block[0] if attention is None else attention]

    def loss(self, student: nn.Module, ids: torch.Tensor) -> torch.Tensor:
        """The loss of the replacement `student` on token ids `[windows, length]`.

        It is the mean squared error over tokens and width, or `relative_error` if `normalised`.
        """
        with torch.no_grad():
            args, kwargs, target = self._run(ids)
        output = layer_output(student(*args, **kwargs))
        return relative_error(output, target) if self._normalised else nn.functional.mse_loss(output, target)

    def _run(self, ids: torch.Tensor) -> tuple[tuple[Any, ...], dict[str, Any], torch.Tensor]:
        # The arguments of the replacement, and the output of the block's last layer.
        captured: dict[str, Any] = {}
        with _captured(self._first, self._attention, self._last, captured), suppress(_StopForward):
            self._model.base_model(ids, use_cache=False)
        args, kwargs, hidden = captured["args"], captured["kwargs"], captured["input"]
        if args:
            return (hidden, *args[1:]), kwargs, captured["output"]
        return args, {**kwargs, "hidden_states": hidden}, captured["output"]


@contextmanager
def _captured(first: nn.Module, attention: nn.Module, last: nn.Module, captured: dict[str, Any]) -> Iterator[None]:
    def before_first(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        captured["input"] = args[0] if args else kwargs["hidden_states"]

    def before_attention(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        captured.update(args=args, kwargs=kwargs)

    def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        captured["output"] = layer_output(output)
        raise _StopForward

    hooks = [
        first.register_forward_pre_hook(before_first, with_kwargs=True),
        attention.register_forward_pre_hook(before_attention, with_kwargs=True),
        last.register_forward_hook(after),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
