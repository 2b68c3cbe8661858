"""The linear modules of a model: those whose weights a quantizer may convert."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True)
class LinearModule:
    """The size of one linear module.

    Args:
        weights: Number of weights, without biases.
        depth: Number of inputs, over which each output sums, for an `nn.Linear`; 0 for any other module.
    """

    weights: int
    depth: int = 0


def meta_model(config: PreTrainedConfig) -> PreTrainedModel:
    """Make the model of a config on the meta device, without memory for its weights.

    Args:
        config: The config of a model that is not quantized.
    """
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=is_trusted_code(config))
    return model


def is_trusted_code(config: PreTrainedConfig) -> bool:
    """Whether a config is of a class from its checkpoint's own code, which the user has allowed to run then."""
    return type(config).__module__.startswith("transformers_modules")


def linear_modules_of(model: nn.Module) -> dict[str, LinearModule]:
    """The linear modules of a model, by module name and in the model's order.

    These are `nn.Linear` and `Conv1D` layers, and modules that stack the weights of all experts.

    Args:
        model: A model without quantized weights. It may be on the meta device.
    """
    linear = {name: _linear_module(module) for name, module in model.named_modules()}
    return {name: size for name, size in linear.items() if size is not None}


def _linear_module(module: nn.Module) -> LinearModule | None:
    """The size of a module if it is linear, else `None`."""
    if isinstance(module, nn.Linear):
        return LinearModule(module.weight.numel(), module.in_features)
    own = [each for each in module.parameters(recurse=False) if each.dim() == (2 if isinstance(module, Conv1D) else 3)]
    return LinearModule(sum(each.numel() for each in own)) if own else None
