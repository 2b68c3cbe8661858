"""Hidden states of a model on many windows, in files: they are carried from layer to layer, each layer read once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from optimum.streamline.models.architectures import architecture_of, decoder_layers
from optimum.streamline.models.offloaded_weights import device_of, in_memory
from optimum.streamline.system.disk import reserve
from optimum.streamline.text.windows import BATCH

from .residual_stream import embeddings, run_layer


class StateFile:
    """States `[windows, length, width]` in fp32, one of each window of a text. Only what is asked for is in memory.

    Args:
        file: The file. It is made anew.
        ids: Token ids of the windows, `[windows, length]`.
        width: The width of the states.

    Raises:
        OSError: the file cannot be made, or the disk has too little room for it.
    """

    def __init__(self, file: Path, ids: torch.Tensor, width: int) -> None:
        self.ids, self._file = ids, file
        self._places = {row.cpu().numpy().tobytes(): place for place, row in enumerate(ids)}
        np.lib.format.open_memmap(file, mode="w+", dtype=np.float32, shape=(*ids.shape, width))
        reserve(file)

    def read(self, ids: torch.Tensor) -> torch.Tensor:
        """The states `[batch, length, width]` of some windows of the text, on the device of their ids."""
        return torch.from_numpy(self._open("r")[self._rows(ids)]).to(ids.device)

    def write(self, ids: torch.Tensor, states: torch.Tensor) -> None:
        """Write the states `[batch, length, width]` of some windows of the text."""
        self._open("r+")[self._rows(ids)] = states.float().cpu().numpy()

    def _open(self, mode: str) -> np.ndarray:
        # Mapped anew each time: pages that were used once would count as memory of the process until it is unmapped.
        opened: np.ndarray = np.load(self._file, mmap_mode=mode)  # type: ignore[arg-type]
        return opened

    def _rows(self, ids: torch.Tensor) -> list[int]:
        return [self._places[row.tobytes()] for row in ids.cpu().numpy()]


@torch.no_grad()
def write_embeddings(model: PreTrainedModel, states: StateFile) -> None:
    """Write the input of layer 0 of every window.

    Args:
        model: The model, in evaluation mode.
        states: The file.
    """
    for ids in _batches(model, states):
        states.write(ids, embeddings(model, ids))


@torch.no_grad()
def carry(model: PreTrainedModel, source: StateFile, target: StateFile, layers: range) -> None:
    """Run layers on the states of every window. Each layer runs on all windows before the next one is read.

    Args:
        model: The model, in evaluation mode.
        source: The input of the first layer.
        target: The file for the output of the last layer; it may be `source`. Without layers it is not written.
        layers: The numbers of the layers, in order.
    """
    for layer in layers:
        with in_memory(decoder_layers(model, architecture_of(model.config))[layer]):
            for ids in _batches(model, source):
                target.write(ids, run_layer(model, ids, layer, source.read(ids)))
        source = target


def _batches(model: PreTrainedModel, states: StateFile) -> Iterator[torch.Tensor]:
    device = device_of(model)
    return (ids.to(device) for ids in states.ids.split(BATCH))
