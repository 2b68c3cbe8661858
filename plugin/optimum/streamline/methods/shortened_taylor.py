"""Shortened LLaMA by Taylor expansion (arXiv 2402.02834): remove the layers whose weights the loss leans on least."""

from __future__ import annotations

import math

import torch
from torch import nn
from transformers import PreTrainedModel

from ..anatomy import architecture_of, decoder_layers
from ..errors import StreamlineError
from ..evidence import Evidence
from ..plan import Plan
from ..progress import progress_bar
from ..recipe import Recipe
from ..scores import BATCH
from ..trials import cross_entropy_sum
from ..windows import Windows
from .protecting import Protecting


class ShortenedTaylor(Protecting):
    """Importance of layer i is the sum of |w dL/dw| over the entries w of its weights; the n lowest go at once.

    L is the mean cross-entropy over all calibration tokens, and one gradient of it is taken: |.| stands outside of
    the sum over windows. The first four and the last two layers are protected, the paper's "+", unless `protect` says
    otherwise; ties go to the first layer. Weights are the matrices, all experts' among them, and the norms' gains, as
    in the authors' code; biases, which LLaMA has none of, do not count. The paper's calibration text is ten windows of
    128 tokens of BookCorpus.
    """

    summary = "the layers of lowest sum of |weight x gradient|, all at once (2402.02834)"
    needs_float = "takes gradients"
    default_protect = "4,2"

    def plan(self, recipe: Recipe, evidence: Evidence) -> Plan:
        """The `remove` layers of lowest Taylor importance."""
        importance = taylor_importance(evidence.model, evidence.calibration)
        layers = self.removable(recipe, evidence.layers)
        lowest = sorted(layers, key=lambda layer: (importance[layer], layer))[: self.count(recipe, evidence.layers)]
        return Plan(evidence.layers, tuple(sorted(lowest)), recipe.stand_in)


def taylor_importance(model: PreTrainedModel, windows: Windows) -> list[float]:
    """For each layer the sum of |w dL/dw| over its weights but biases, L in nats per token; `model` is left as it was.

    Memory holds a gradient for every such weight.

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
    if weight.grad is None:  # an expert that no token was sent to, or a sublayer that is out
        return 0.0
    return float((weight.detach() * weight.grad).abs().sum(dtype=torch.float64))
