"""A loaded model's quantized weights: as float numbers, and in the form that they were read in.

Knows the two libraries' parameters, neither files nor configs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel


def is_quantized_weight(parameter: torch.Tensor) -> bool:
    """Whether these numbers stand for others: bitsandbytes' parameters, and torchao's tensors."""
    return type(parameter.data) is not torch.Tensor or type(parameter).__name__ in ("Params4bit", "Int8Params")


def float_values(module: nn.Module, parameter: nn.Parameter) -> torch.Tensor:
    """The numbers that a parameter of `module` stands for, which are its own if it is not quantized."""
    if type(parameter).__name__ in ("Params4bit", "Int8Params"):
        from transformers.integrations.bitsandbytes import dequantize_bnb_weight

        numbers: torch.Tensor = dequantize_bnb_weight(parameter, getattr(module, "state", None))
        return numbers
    if type(parameter.data) is not torch.Tensor:
        tensor: Any = parameter.data
        values: torch.Tensor = tensor.dequantize()
        return values
    return parameter.detach()


def quantized_modules(model: nn.Module) -> list[str]:
    """The names of the modules with a quantized weight."""
    return [
        name
        for name, module in model.named_modules()
        if any(is_quantized_weight(each) for each in module.parameters(recurse=False))
    ]


def stays_packed(model: PreTrainedModel) -> bool:
    """Whether a quantized model's weights keep their form when it computes; tried with one token.

    Some quantizers unpack all weights at the first forward pass: such a model cannot be saved as it was afterwards.
    """
    before = _forms(model)
    with torch.inference_mode():
        model(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=model.device), use_cache=False)
    return _forms(model) == before


def _forms(model: nn.Module) -> dict[str, tuple[torch.dtype, torch.Size]]:
    return {name: (value.dtype, value.shape) for name, value in model.state_dict().items()}


def keep_as_read(model: nn.Module) -> None:
    """Have 4-bit weights of bitsandbytes stay as they are when the model is run on a CPU, in place.

    bitsandbytes 0.50 has a kernel for CPUs with AVX512-BF16, for which it rewrites the weights at the first product:
    their scales are rounded to bfloat16, and what `save_pretrained` then makes of them is another model, for the scales
    of weights without double quantization are not turned back around. What is to be saved must not get there.
    """
    for module in _with_cpu_kernel(model):
        module.support_avx512bf16_for_cpu = False


def save_as_read(model: PreTrainedModel) -> None:
    """Have quantized weights be saved in the form they were read in, in place.

    transformers 5.23 tries to undo on saving all it did on reading, and of unpacking quantized weights it cannot: a
    model of bitsandbytes or torchao that was read could not be saved again.
    """
    read = getattr(model, "_weight_conversions", None)
    if read is not None:
        kept: Any = [each for each in read if _can_be_undone(each)]
        model._weight_conversions = kept


def _can_be_undone(conversion: Any) -> bool:
    try:
        conversion.reverse_transform()
    except NotImplementedError:
        return False
    return True


def use_cpu_kernel(model: nn.Module) -> None:
    """Have that kernel take the products that it can, in place: those of 32 rows, and of whole blocks, at a time.

    Without this check bitsandbytes fails on the others.
    """
    if not (modules := _with_cpu_kernel(model)):
        return
    from bitsandbytes.functional import has_avx512bf16

    there = bool(has_avx512bf16())
    for module in modules:
        blocks = module.in_features % module.weight.quant_state.blocksize == 0
        module.support_avx512bf16_for_cpu = there and blocks and module.out_features % 32 == 0


def _with_cpu_kernel(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "support_avx512bf16_for_cpu")]
