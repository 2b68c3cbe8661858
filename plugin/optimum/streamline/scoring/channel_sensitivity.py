"""What merging goes by: how alike neighbours are, and how much each channel of a layer matters; one streaming pass.

Knows nothing of what is made of it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from optimum.streamline.models.architectures import (
    Sublayer,
    architecture_of,
    decoder_layers,
    key_value_heads,
    layer_kinds,
    submodule,
)
from optimum.streamline.models.channels import Channels, rows_of, sublayer_weights
from optimum.streamline.text.windows import Windows

from .similarity import Scores, measure_scores


def measure_channels(model: PreTrainedModel, windows: Windows) -> tuple[Scores, tuple[Channels, ...]]:
    """`measure_scores` and, in the same pass, every layer's channel sensitivities (CoMe, arXiv 2510.15304).

    With a_j the input j of a sublayer's output projection W: a neuron's sensitivity is E|a_j| sum_r |W_rj|, that of a
    key-value head the mean of the same over the inputs that its query heads give. E is a mean over tokens.

    Returns:
        The scores, and for each layer its sensitivities, float64, on the CPU.

    Raises:
        StreamlineError: a layer's output is not finite.
    """
    architecture = architecture_of(model.config)
    outputs: list[dict[Sublayer, nn.Module]] = [
        {name: submodule(layer, half.output) for name, half in sublayer_weights(architecture).items()}
        for layer in decoder_layers(model, architecture)
    ]
    sums = {
        module: torch.zeros_like(rows_of(module)[0], dtype=torch.float64) for of in outputs for module in of.values()
    }

    def add(module: nn.Module, args: tuple[Any, ...]) -> None:
        sums[module] += args[0].abs().flatten(0, -2).sum(0, dtype=torch.float64)

    hooks = [module.register_forward_pre_hook(add) for module in sums]
    try:
        scores = measure_scores(model, windows)
    finally:
        for hook in hooks:
            hook.remove()
    heads = key_value_heads(model.config)
    return scores, tuple(
        {
            name: _sensitivity(module, sums[module] / windows.ids.numel(), heads if name == "attention" else None)
            for name, module in of.items()
        }
        for of in outputs
    )


@torch.no_grad()
def _sensitivity(output: nn.Module, size: torch.Tensor, channels: int | None) -> torch.Tensor:
    each = (size * rows_of(output).abs().sum(0, dtype=torch.float64)).cpu()
    return each if channels is None else each.unflatten(0, (channels, -1)).mean(1)


def closest_pair(model: PreTrainedModel, scores: Scores) -> int:
    """The first of the two neighbours whose input and output differ least in direction: lowest d_i.

    d_i is the mean over windows of arccos(cos(h_i, h_{i+2})) / pi on the window's last token. Only layers of one kind
    of attention are a pair; ties go to the first.
    """
    kinds = layer_kinds(model.config)
    angles = scores.block_angle(2)
    pairs = [first for first in range(len(angles)) if kinds[first] == kinds[first + 1]]
    return min(pairs, key=lambda first: (angles[first], first))


def ratio_of_first(scores: Scores, first: int) -> float:
    """BI_i / (BI_i + BI_{i+1}) for i = `first`, of the model as it is; a half where neither changes the stream."""
    # Rounding puts the cosine of equal streams beyond 1, and a part below 0 would be no part.
    ours, theirs = (max(0.0, influence) for influence in scores.block_influence[first : first + 2])
    return ours / (ours + theirs) if ours + theirs > 0 else 0.5
