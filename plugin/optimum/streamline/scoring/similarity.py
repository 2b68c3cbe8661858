"""Cosine similarity and angle between the hidden states at every two depths, in one pass over the calibration text.

Block Influence and the block scores of LLM-Streamline and Gromov et al. follow from them. Memory grows neither with the
number of windows nor with the square of their length.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from optimum.streamline.errors import StreamlineError
from optimum.streamline.models.architectures import architecture_of, decoder_layers, layer_output
from optimum.streamline.models.offloaded_weights import device_of, run_layers
from optimum.streamline.system.progress import progress_bar
from optimum.streamline.text.windows import BATCH, Windows

CHUNK_TOKENS = 512


@dataclass(frozen=True)
class Scores:
    """The similarity of the residual stream at every two depths.

    h_0 is the output of the embeddings. h_i is the raw output of layer i - 1, before any final norm.

    Args:
        similarity: `[layers + 1][layers + 1]`; entry `[i][j]` is the mean over tokens of cos(h_i, h_j).
        last_angle: `[layers + 1][layers + 1]`; entry `[i][j]` is the mean over windows of arccos(cos(h_i, h_j)) / pi
            on the last token of the window, between 0 and 1; empty if it was not measured.
    """

    similarity: tuple[tuple[float, ...], ...]
    last_angle: tuple[tuple[float, ...], ...] = ()

    @property
    def layers(self) -> int:
        """How many layers the model has."""
        return len(self.similarity) - 1

    @property
    def block_influence(self) -> tuple[float, ...]:
        """The Block Influence BI_i = 1 - E[cos(h_i, h_{i+1})] of every layer i (ShortGPT, arXiv 2403.03853)."""
        return tuple(1.0 - self.similarity[layer][layer + 1] for layer in range(self.layers))

    def block_similarity(self, length: int) -> tuple[float, ...]:
        """E[cos(h_j, h_{j+length})] of every block of `length` layers that starts at layer j = 0, 1, ...

        LLM-Streamline (arXiv 2403.19135) prunes the block of the highest value.
        """
        return tuple(self.similarity[first][first + length] for first in range(self.layers - length + 1))

    def block_angle(self, length: int) -> tuple[float, ...]:
        """E[arccos(cos(h_j, h_{j+length})) / pi] on last tokens, of every block of `length` layers from j = 0, 1, ...

        Gromov et al. (arXiv 2403.17887) prune the block of the lowest value.
        """
        return tuple(self.last_angle[first][first + length] for first in range(self.layers - length + 1))


@torch.inference_mode()
def measure_scores(model: PreTrainedModel, windows: Windows) -> Scores:
    """Measure the scores of `model` in one forward pass over `windows`.

    Args:
        model: The model, in evaluation mode; it is unchanged.
        windows: The calibration text.

    Raises:
        StreamlineError: a layer's output is not finite.
    """
    layers = decoder_layers(model, architecture_of(model.config))
    device = device_of(model)
    depths: list[torch.Tensor] = []

    def states(batch: torch.Tensor) -> list[torch.Tensor]:
        depths.clear()
        run_layers(model, batch.to(device))
        return depths

    hooks = [layers[0].register_forward_pre_hook(lambda _, args, kwargs: _keep(depths, args, kwargs), with_kwargs=True)]
    hooks += [
        layer.register_forward_hook(lambda _, args, output: depths.append(layer_output(output))) for layer in layers
    ]
    try:
        return scores_of(states, len(layers), windows)
    finally:
        for hook in hooks:
            hook.remove()


def scores_of(states: Callable[[torch.Tensor], list[torch.Tensor]], layers: int, windows: Windows) -> Scores:
    """Compute the scores of a model in any runtime from its hidden states.

    Args:
        states: A function from token ids `[batch, length]` to `layers` + 1 tensors `[batch, length, width]`: the input
            of layer 0 and the output of every layer.
        layers: The number of layers.
        windows: The calibration text.

    Raises:
        StreamlineError: a layer's output is not finite.
    """
    total = torch.zeros(layers + 1, layers + 1, dtype=torch.float64)
    angle = torch.zeros_like(total)
    with progress_bar("scoring layers", len(windows.ids)) as bar:
        for batch in windows.ids.split(BATCH):
            depths = states(batch)
            total += _similarity_sum(depths)
            angle += _last_angle_sum(depths)
            bar.advance(len(batch))
    mean = total / windows.ids.numel()
    if not bool(mean.isfinite().all()):
        first = int((~mean.diagonal().isfinite()).nonzero()[0])
        raise StreamlineError(f"model: the output of layer {max(first - 1, 0)} is not finite on the calibration text")
    return Scores(_rows(mean), _rows(angle / len(windows.ids)))


def _keep(depths: list[torch.Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    depths.append(args[0] if args else kwargs["hidden_states"])


def _similarity_sum(depths: list[torch.Tensor]) -> torch.Tensor:
    # Each depth becomes one long row of normalised states. The product of two rows is then the sum of the cosines of
    # all tokens, without a matrix of tokens against tokens.
    rows = torch.stack([depth.flatten(0, 1) for depth in depths])
    total = torch.zeros(len(depths), len(depths), dtype=torch.float64, device=rows.device)
    for chunk in rows.split(CHUNK_TOKENS, dim=1):
        unit = nn.functional.normalize(chunk.double(), dim=-1).flatten(1)
        total += unit @ unit.T
    return total.cpu()


def _last_angle_sum(depths: list[torch.Tensor]) -> torch.Tensor:
    last = torch.stack([depth[:, -1] for depth in depths], dim=1)
    unit = nn.functional.normalize(last.double(), dim=-1)
    # Rounding can put the cosine of equal vectors above 1, where arccos is not a number.
    cosine = (unit @ unit.mT).clamp(-1, 1)
    return (cosine.arccos() / math.pi).sum(0).cpu()


def _rows(matrix: torch.Tensor) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(row) for row in matrix.tolist())
