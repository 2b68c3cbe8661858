"""Layer importance by first-order Taylor expansion of the loss (Shortened LLaMA, arXiv 2402.02834)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel

from optimum.streamline.editing.residual_stream import embeddings, run_layer
from optimum.streamline.errors import StreamlineError
from optimum.streamline.models.architectures import architecture_of, decoder_layers
from optimum.streamline.models.kept_tensor import KeptTensor
from optimum.streamline.models.offloaded_weights import device_of, in_memory, is_offloaded
from optimum.streamline.system.progress import progress_bar
from optimum.streamline.text.windows import BATCH, Windows

from .loss import stream_gradient


def taylor_importance(model: PreTrainedModel, windows: Windows) -> list[float]:
    """The Taylor importance of every layer: the sum of |w dL/dw| over its weights w.

    L is the mean cross-entropy in nats per token. Biases do not count.

    The gradient goes back one layer at a time, and each layer runs again for it. In memory that is done batch by batch,
    and memory holds one gradient for each of the layers' weights. If the weights are on disk, all batches go through a
    layer before the next one is read. Memory then holds one layer with its gradients, and the disk the input of every
    layer for all windows. Both give the same to the bit.

    Args:
        model: The model, in evaluation mode and in float; it is unchanged afterwards.
        windows: The calibration text.

    Returns:
        One importance for each layer.

    Raises:
        StreamlineError: a layer's gradient is not finite.
    """
    batches = [batch.to(device_of(model)) for batch in windows.ids.split(BATCH)]
    rounds = [batches] if is_offloaded(model) else [[batch] for batch in batches]
    tokens = windows.ids[:, 1:].numel()
    importance: dict[int, float] = {}
    steps = len(rounds) * model.config.num_hidden_layers
    with _without_gradients(model), progress_bar("taking gradients", steps) as bar:
        for some in rounds:
            for index, value in _importance_so_far(model, some, tokens):
                importance[index] = value
                bar.advance(1)
    for index in sorted(importance):
        if not math.isfinite(importance[index]):
            raise StreamlineError(f"model: the gradient of layer {index} is not finite on the calibration text")
    return [importance[index] for index in sorted(importance)]


def _importance_so_far(
    model: PreTrainedModel, batches: Sequence[torch.Tensor], tokens: int
) -> Iterator[tuple[int, float]]:
    """The importance of each layer, from the last to the first, on these batches.

    The gradients of earlier batches that the weights have already count too.
    """
    layers = list(decoder_layers(model, architecture_of(model.config)))
    states = _states(model, batches)
    last = zip(batches, states.pop(), strict=True)
    gradients = [KeptTensor(model, stream_gradient(model, ids, state.read()) / tokens) for ids, state in last]
    for index in reversed(range(len(layers))):
        entering = zip(batches, states.pop(), gradients, strict=True)
        with in_memory(layers[index]):
            weights = _weights(layers[index])
            for weight in weights:
                weight.requires_grad_(True)
            gradients = [
                KeptTensor(model, _pass_back(model, ids, index, state.read(), gradient.read()))
                for ids, state, gradient in entering
            ]
            for weight in weights:
                weight.requires_grad_(False)
            yield index, sum(_taylor(weight) for weight in weights)


@torch.no_grad()
def _states(model: PreTrainedModel, batches: Sequence[torch.Tensor]) -> list[list[KeptTensor]]:
    """The input of every layer, and the output of the last, for each batch."""
    states = [[KeptTensor(model, embeddings(model, ids)) for ids in batches]]
    for index, layer in enumerate(list(decoder_layers(model, architecture_of(model.config)))):
        entering = zip(batches, states[-1], strict=True)
        with in_memory(layer):
            states.append([KeptTensor(model, run_layer(model, ids, index, state.read())) for ids, state in entering])
    return states


def _pass_back(
    model: PreTrainedModel, ids: torch.Tensor, layer: int, state: torch.Tensor, gradient: torch.Tensor
) -> torch.Tensor:
    """Add a batch to the gradients of a layer's weights.

    Args:
        model: The model.
        ids: Token ids `[windows, length]`.
        layer: The number of the layer.
        state: Its input `[windows, length, width]`.
        gradient: The gradient of its output.

    Returns:
        The gradient of its input; zeros for layer 0, before which there is no layer.
    """
    state = state.detach().requires_grad_(True)
    output = run_layer(model, ids, layer, state)
    if output.requires_grad:  # not if layer 0 skips both sublayers
        output.backward(gradient)
    return torch.zeros_like(state) if state.grad is None else state.grad


@contextmanager
def _without_gradients(model: PreTrainedModel) -> Iterator[None]:
    """Let no weight require a gradient inside the `with` block, and then restore that, and drop all gradients."""
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        for parameter in flags:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
            parameter.grad = None


def _weights(layer: nn.Module) -> list[nn.Parameter]:
    return [parameter for name, parameter in layer.named_parameters() if not name.endswith("bias")]


def _taylor(weight: nn.Parameter) -> float:
    if weight.grad is None:  # the weight of an expert that no token was routed to, or of a skipped sublayer
        return 0.0
    return float((weight.detach() * weight.grad).abs().sum(dtype=torch.float64))
