"""Load a model with its weights left on disk, and read one parameter at a time.

transformers and accelerate do the work. Parameters of an offloaded model are on the meta device. Each module reads its
weights just before it runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from .quantized_weights import float_values


def offload_options(folder: Path) -> dict[str, Any]:
    """The arguments of `from_pretrained` that leave all weights on disk.

    Args:
        folder: A folder for weights that must be converted when they are loaded. It must exist as long as the model.
    """
    return {"device_map": {"": "disk"}, "offload_folder": str(folder)}


def read_parameter(model: PreTrainedModel, name: str) -> torch.Tensor:
    """The values of a parameter, read from disk if the model is offloaded, and dequantized if it is quantized.

    Args:
        model: The model.
        name: The parameter's name, as in `named_parameters`.

    Returns:
        The values. Those of an offloaded parameter take memory only as long as the caller keeps them.
    """
    parameter = model.get_parameter(name)
    if not parameter.is_meta:
        return float_values(model.get_submodule(name.rpartition(".")[0]), parameter)
    from transformers.integrations.accelerate import load_offloaded_parameter

    weight: torch.Tensor = load_offloaded_parameter(model, name)
    return weight
