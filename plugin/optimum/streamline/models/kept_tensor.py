"""A tensor that is computed beside a model, kept where the model's weights are: in memory or on disk."""

from __future__ import annotations

import weakref
from functools import partial
from pathlib import Path
from uuid import uuid4

import numpy as np
import torch
from transformers import PreTrainedModel

from .offloaded_weights import is_offloaded, weights_on_disk


class KeptTensor:
    """A tensor such as the hidden states of a batch, of which a pass through a large model makes too many for memory.

    Args:
        model: The model. If its weights are on disk, the tensor is written to a file beside those that have changed.
            The file is deleted with this object.
        value: The tensor; in fp32, if the weights are on disk.

    Raises:
        OSError: the file cannot be written.
    """

    def __init__(self, model: PreTrainedModel, value: torch.Tensor) -> None:
        self._value: torch.Tensor | Path = value
        self._device = value.device
        if is_offloaded(model):
            [weights] = weights_on_disk(model)
            self._value = Path(weights.save_folder) / f"kept-{uuid4().hex}.npy"
            weakref.finalize(self, partial(self._value.unlink, missing_ok=True))
            np.save(self._value, value.cpu().numpy())

    def read(self) -> torch.Tensor:
        """The tensor. Do not change it."""
        if isinstance(self._value, Path):
            return torch.from_numpy(np.load(self._value)).to(self._device)
        return self._value
