"""Local training: each layer that an edit cut is trained on its own input and output in the original, one at a time.

An edit leaves layers that stand for more of the original than they compute: an attention or an MLP that lost its
neighbour, an attention and an MLP of two layers, a layer before removed ones, a merged layer.

h_k is the original's residual stream after k layers. The output of new layer n should match h_{depths[n]}
(`Plan.depths`), the state that the next layer should get. So the input of layer n is h_{depths[n-1]}; the first layer
gets h_0, the embeddings. An attention of layer i packed with the MLP of layer j gets h_i, and should give h_{j+1} if
something of layer j + 1 stays, or else the first state after it at which something does. An attention or an MLP alone
in layer i gets h_i, and should give h_{i+1} in the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from optimum.streamline.editing.packing import sublayers_left
from optimum.streamline.editing.plan import PlannedLayer, depths_of
from optimum.streamline.models.architectures import architecture_of, decoder_layers
from optimum.streamline.models.skipped_sublayers import ATTENTION, MLP, skipped_of

from .losses import BlockOutput


@dataclass(frozen=True)
class CutLayer:
    """A layer of the new model that stands for more sublayers of the original than it has.

    Args:
        layer: Its number in the new model.
        block: Numbers of the original layers that it stands for. The first one's input is its input, and the last one's
            output is its target.
        attention: Number of the original layer that its attention comes from; for an MLP alone, of its layer.
    """

    layer: int
    block: tuple[int, ...]
    attention: int


def cut_layers(
    new_layers: Sequence[PlannedLayer], original: PreTrainedConfig, edited: PreTrainedConfig
) -> tuple[CutLayer, ...]:
    """The layers of an edited model that local training trains, in order.

    Sublayers that the original skips already are not lost. A layer that computes nothing is left out, because it has
    nothing to train.

    Args:
        new_layers: The layers of the edited model.
        original: The config of the original.
        edited: The config of the edited model.
    """
    total, left_out = original.num_hidden_layers, skipped_of(edited)
    computed = sublayers_left(total, skipped_of(original))
    depths = depths_of(new_layers, total)
    cut: list[CutLayer] = []
    for index, (planned, start, end) in enumerate(zip(new_layers, (0, *depths), depths, strict=False)):
        block = tuple(range(start, end))
        own = sum((index, kind) not in left_out for kind in (ATTENTION, MLP))
        if 0 < own < sum(layer in block for layer, _ in computed):
            cut.append(CutLayer(index, block, planned.attention_originals[0]))
    return tuple(cut)


class LayerError:
    """The error of one layer of a model: a `HealingLoss` that runs the original and this layer, and nothing else.

    The layer gets the original's hidden state, and not the model's. So it does not learn to make up for errors of the
    layers before it; distillation of the whole model does that.

    Args:
        teacher: The original.
        cut: The layer.
    """

    def __init__(self, teacher: PreTrainedModel, cut: CutLayer) -> None:
        self._layer = cut.layer
        self._block_output = BlockOutput(teacher.eval(), cut.block, normalised=True, attention=cut.attention)

    def loss(self, model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
        """The `relative_error` of the layer's output, given the original's state of token ids `[windows, length]`."""
        return self._block_output.loss(decoder_layers(model, architecture_of(model.config))[self._layer], ids)
