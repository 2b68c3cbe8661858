"""The measurements that CoMe merges layers by: channel sensitivities, the closest pair, and the pair's ratio.

A channel is a neuron of the MLP or a key-value head of the attention. All figures come from one pass over the text.
Source: CoMe, arXiv 2510.15304.
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
from optimum.streamline.models.offloaded_weights import device_of, in_memory
from optimum.streamline.text.windows import Windows

from .similarity import Scores, measure_scores


def measure_channels(model: PreTrainedModel, windows: Windows) -> tuple[Scores, tuple[Channels, ...]]:
    """`measure_scores` and the channel sensitivities of every layer, in one pass (CoMe, arXiv 2510.15304).

    Let W be the output projection of a sublayer (`down_proj` or `o_proj`) and a_j its input number j. Neuron j has the
    sensitivity S_j = E|a_j| sum_r |W_rj|, where E is the mean over tokens. A key-value head has the mean of S_j over
    the inputs j that come from its query heads.

    Args:
        model: The model, in evaluation mode; it is unchanged.
        windows: The calibration text.

    Returns:
        The scores, and for each layer its sensitivities `[key-value heads]` and `[neurons]`, float64, on the CPU.

    Raises:
        StreamlineError: a layer's output is not finite.
    """
    architecture = architecture_of(model.config)
    projections: list[dict[Sublayer, nn.Module]] = [
        {name: submodule(layer, weights.output) for name, weights in sublayer_weights(architecture).items()}
        for layer in decoder_layers(model, architecture)
    ]
    device = device_of(model)
    sums = {
        module: torch.zeros(rows_of(module).shape[1], dtype=torch.float64, device=device)
        for by_sublayer in projections
        for module in by_sublayer.values()
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
            for name, module in by_sublayer.items()
        }
        for by_sublayer in projections
    )


@torch.no_grad()
def _sensitivity(output: nn.Module, mean_size: torch.Tensor, heads: int | None) -> torch.Tensor:
    # `mean_size` is E|a_j| for every input j of the projection `output`. With `heads`, the inputs are averaged by head.
    with in_memory(output):
        by_input = (mean_size * rows_of(output).abs().sum(0, dtype=torch.float64)).cpu()
    return by_input if heads is None else by_input.unflatten(0, (heads, -1)).mean(1)


def closest_pair(model: PreTrainedModel, scores: Scores) -> int:
    """The number i of the first layer of the pair (i, i+1) that rotates the residual stream least: lowest d_i.

    d_i is the mean over windows of arccos(cos(h_i, h_{i+2})) / pi, on the last token of each window. Both layers of a
    pair must have the same kind of attention. Among equal pairs the first one wins.

    Args:
        model: The model that `scores` were measured on.
        scores: From `measure_channels` or `measure_scores`.
    """
    kinds = layer_kinds(model.config)
    angles = scores.block_angle(2)
    pairs = [first for first in range(len(angles)) if kinds[first] == kinds[first + 1]]
    return min(pairs, key=lambda first: (angles[first], first))


def ratio_of_first(scores: Scores, first: int) -> float:
    """The merging ratio of layer i = `first`: BI_i / (BI_i + BI_{i+1}), with BI the Block Influence.

    It is 0.5 where neither layer changes the residual stream.
    """
    # Rounding can put the cosine of equal states above 1, and the Block Influence below 0.
    influence, next_influence = (max(0.0, value) for value in scores.block_influence[first : first + 2])
    return influence / (influence + next_influence) if influence + next_influence > 0 else 0.5
