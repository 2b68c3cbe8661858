"""The float values of quantized weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from optimum.streamline.models.quantized_weights import float_values


class OnlyMultiplied(torch.Tensor):
    """A weight that can be multiplied and not dequantized, as torchao packs it for CUDA."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.dequantize:
            raise NotImplementedError
        return super().__torch_function__(func, types, args, kwargs or {})


def test_a_weight_that_can_only_be_multiplied_gives_its_values() -> None:
    weight = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    module = nn.Linear(5, 3)
    parameter: Any = nn.Parameter(weight.as_subclass(OnlyMultiplied), requires_grad=False)
    values = float_values(module, parameter)
    assert type(parameter.data) is OnlyMultiplied
    assert torch.equal(values.as_subclass(torch.Tensor), weight)
