"""The products of a model: what multiplies by weights that a quantizer may take. From a config alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True)
class LinearModule:
    """One module that multiplies by weights.

    Args:
        weights: How many, biases aside.
        depth: How many numbers each output is a sum of, where all weights are one `nn.Linear`; else 0.
    """

    weights: int
    depth: int = 0


def meta_model(config: PreTrainedConfig) -> PreTrainedModel:
    """The model of this config without numbers; `config` must not be that of a quantized one."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


def linear_modules_of(model: nn.Module) -> dict[str, LinearModule]:
    """By module name, in the model's order: linear layers, and experts whose weights are stacked in one module.

    Args:
        model: One whose weights are not quantized; numbers it need not have.
    """
    found = {name: _product(module) for name, module in model.named_modules()}
    return {name: product for name, product in found.items() if product is not None}


def _product(module: nn.Module) -> LinearModule | None:
    if isinstance(module, nn.Linear):
        return LinearModule(module.weight.numel(), module.in_features)
    own = [each for each in module.parameters(recurse=False) if each.dim() == (2 if isinstance(module, Conv1D) else 3)]
    return LinearModule(sum(each.numel() for each in own)) if own else None
