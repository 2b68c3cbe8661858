"""Weights that stay on disk: a model's parameters read one at a time, wherever they lie.

transformers and accelerate do the work: a model loaded with its weights offloaded has parameters on the meta device,
and computes by reading each module's weights just before it runs. Knows neither checkpoints nor architectures.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from .quantized_weights import float_values


def offload_options(folder: Path) -> dict[str, Any]:
    """Arguments with which `from_pretrained` leaves all weights on disk.

    Args:
        folder: Where those go that are not in the checkpoint as the model needs them; to be there as long as the model.
    """
    return {"device_map": {"": "disk"}, "offload_folder": str(folder)}


def read_parameter(model: PreTrainedModel, name: str) -> torch.Tensor:
    """The values of a parameter, in memory only while they are held: read from disk if they lie there.

    Of a quantized parameter, those that its numbers stand for.
    """
    parameter = model.get_parameter(name)
    if not parameter.is_meta:
        return float_values(model.get_submodule(name.rpartition(".")[0]), parameter)
    from transformers.integrations.accelerate import load_offloaded_parameter

    weight: torch.Tensor = load_offloaded_parameter(model, name)
    return weight
