"""Local training: each layer that an edit cut is trained on its own input and output in the original, one at a time.

An edit leaves layers that stand for more of the original than they compute: an attention or an MLP that lost its
neighbour, an attention and an MLP of two layers, a layer before removed ones, a merged layer.

h_k is the original's residual stream after k layers. The output of new layer n should match h_{depths[n]}
(`Plan.depths`), the state that the next layer should get. So the input of layer n is h_{depths[n-1]}; the first layer
gets h_0, the embeddings. An attention of layer i packed with the MLP of layer j gets h_i, and should give h_{j+1} if
something of layer j + 1 stays, or else the first state after it at which something does. An attention or an MLP alone
in layer i gets h_i, and should give h_{i+1} in the same way.

The original runs once on the healing text. Its states before and after the layer that is trained are in two files, so
only one layer need be in memory, with its gradients and moments.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from optimum.streamline.editing.packing import sublayers_left
from optimum.streamline.editing.plan import PlannedLayer, depths_of
from optimum.streamline.editing.residual_stream import run_layer
from optimum.streamline.editing.state_files import carry, write_embeddings
from optimum.streamline.errors import StreamlineError
from optimum.streamline.models.skipped_sublayers import ATTENTION, MLP, skipped_of
from optimum.streamline.system.disk import check_room, free_bytes
from optimum.streamline.system.distributed import process_count
from optimum.streamline.text.window_file import WindowFile

from .losses import relative_error


@dataclass(frozen=True)
class CutLayer:
    """A layer of the new model that stands for more sublayers of the original than it has.

    Args:
        layer: Its number in the new model.
        block: Numbers of the original layers that it stands for. The first one's input is its input, and the last one's
            output is its target.
    """

    layer: int
    block: tuple[int, ...]


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
    for index, (start, end) in enumerate(pairwise((0, *depths))):
        block = tuple(range(start, end))
        own = sum((index, kind) not in left_out for kind in (ATTENTION, MLP))
        if 0 < own < sum(layer in block for layer, _ in computed):
            cut.append(CutLayer(index, block))
    return tuple(cut)


@dataclass(frozen=True)
class LayerError:
    """The error of one layer of a model: a `HealingLoss` that runs this layer, and nothing else.

    The layer gets the original's hidden state, and not the model's. So it does not learn to make up for errors of the
    layers before it; distillation of the whole model does that.

    Args:
        layer: The number of the layer in the model.
        inputs: The original's states that the layer gets, for each window of the text.
        targets: The states that it should give.
    """

    layer: int
    inputs: WindowFile
    targets: WindowFile

    def loss(self, model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
        """The `relative_error` of the layer's output, given the original's state of token ids `[windows, length]`."""
        output = run_layer(model, ids, self.layer, self.inputs.read(ids))
        return relative_error(output, self.targets.read(ids))


def layer_errors(
    original: PreTrainedModel, cut: Sequence[CutLayer], ids: torch.Tensor, folder: Path
) -> Iterator[LayerError]:
    """The errors of cut layers, one at a time. The next one overwrites the states of the one before.

    Args:
        original: The original, in memory or with its weights on disk.
        cut: The layers, in order.
        ids: Token ids of all windows that the errors will be asked for, `[windows, length]`.
        folder: The folder for the two files of states, which exists.

    Yields:
        The error of each layer.

    Raises:
        StreamlineError: the files cannot be made.
    """
    original.eval()
    inputs, targets = _files(folder, ids, original.config.hidden_size)
    write_embeddings(original, inputs)
    depth = 0
    for each in cut:
        first, after = each.block[0], each.block[-1] + 1
        carry(original, inputs, inputs, range(depth, first))
        carry(original, inputs, targets, range(first, after))
        yield LayerError(each.layer, inputs, targets)
        inputs, targets, depth = targets, inputs, after


def _files(folder: Path, ids: torch.Tensor, width: int) -> tuple[WindowFile, WindowFile]:
    # Each process has its own two files.
    needed, free = process_count() * 2 * ids.numel() * width * torch.float32.itemsize, free_bytes(folder)
    try:
        check_room(folder, needed)
        return WindowFile(folder / "one.npy", ids, width), WindowFile(folder / "other.npy", ids, width)
    except OSError as error:
        raise StreamlineError(
            f"heal local: the original's hidden states take {needed / 1e9:.1f} GB in {folder.parent}, where "
            f"{free / 1e9:.1f} GB are free ({error.strerror}); make room, or give fewer heal-tokens"
        ) from error
