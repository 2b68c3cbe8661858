"""Layer importance by first-order Taylor expansion of the loss (Shortened LLaMA, arXiv 2402.02834)."""

from __future__ import annotations

import math

import torch
from torch import nn
from transformers import PreTrainedModel

from optimum.streamline.errors import StreamlineError
from optimum.streamline.models.architectures import architecture_of, decoder_layers
from optimum.streamline.system.progress import progress_bar
from optimum.streamline.text.windows import BATCH, Windows

from .loss import cross_entropy_sum


def taylor_importance(model: PreTrainedModel, windows: Windows) -> list[float]:
    """The Taylor importance of every layer: the sum of |w dL/dw| over its weights w.

    L is the mean cross-entropy in nats per token. Biases do not count. Memory holds one gradient for each of the
    layers' weights.

    Args:
        model: The model, in evaluation mode and in float; it is unchanged afterwards.
        windows: The calibration text.

    Returns:
        One importance for each layer.

    Raises:
        StreamlineError: a layer's gradient is not finite.
    """
    layers = decoder_layers(model, architecture_of(model.config))
    weights = [_weights(layer) for layer in layers]
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    tokens = windows.ids[:, 1:].numel()
    try:
        for parameter in flags:
            parameter.requires_grad_(False)
        for weight in (weight for layer in weights for weight in layer):
            weight.requires_grad_(True)
        with progress_bar("taking gradients", len(windows.ids)) as bar:
            for batch in windows.ids.split(BATCH):
                loss = cross_entropy_sum(model, batch.to(model.device)) / tokens
                loss.backward()
                bar.advance(len(batch))
        importance = [sum(_taylor(weight) for weight in layer) for layer in weights]
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
            parameter.grad = None
    for index, value in enumerate(importance):
        if not math.isfinite(value):
            raise StreamlineError(f"model: the gradient of layer {index} is not finite on the calibration text")
    return importance


def _weights(layer: nn.Module) -> list[nn.Parameter]:
    return [parameter for name, parameter in layer.named_parameters() if not name.endswith("bias")]


def _taylor(weight: nn.Parameter) -> float:
    if weight.grad is None:  # the weight of an expert that no token was routed to, or of a skipped sublayer
        return 0.0
    return float((weight.detach() * weight.grad).abs().sum(dtype=torch.float64))
