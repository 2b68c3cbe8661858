"""The quantized weights of a loaded model: how to dequantize them, and how to save them in their own format.

Two libraries keep quantized weights in parameters of their own: bitsandbytes and torchao.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel


def is_quantized_weight(parameter: torch.Tensor) -> bool:
    """Whether a parameter holds quantized weights of bitsandbytes or torchao."""
    return type(parameter.data) is not torch.Tensor or type(parameter).__name__ in ("Params4bit", "Int8Params")


def float_values(module: nn.Module, parameter: nn.Parameter) -> torch.Tensor:
    """The float values of a parameter: dequantized if it is quantized.

    Args:
        module: The module that owns the parameter.
        parameter: One of its own parameters.
    """
    if type(parameter).__name__ in ("Params4bit", "Int8Params"):
        from transformers.integrations.bitsandbytes import dequantize_bnb_weight

        numbers: torch.Tensor = dequantize_bnb_weight(parameter, getattr(module, "state", None))
        return numbers
    if type(parameter.data) is not torch.Tensor:
        return _torchao_values(parameter.data)
    return parameter.detach()


def _torchao_values(tensor: Any) -> torch.Tensor:
    """The float values of a weight of torchao, `[outputs, inputs]`."""
    values: torch.Tensor
    try:
        values = tensor.dequantize()
    except NotImplementedError:
        # The format that torchao packs for CUDA can only be multiplied. Its product with the identity is its transpose.
        identity = torch.eye(tensor.shape[-1], dtype=tensor.dtype, device=tensor.device)
        with torch.inference_mode():
            values = nn.functional.linear(identity, tensor).T.contiguous()
    return values


def quantized_modules(model: nn.Module) -> list[str]:
    """The names of the modules that own a quantized weight."""
    return [
        name
        for name, module in model.named_modules()
        if any(is_quantized_weight(each) for each in module.parameters(recurse=False))
    ]


def stays_quantized_in_forward(model: PreTrainedModel) -> bool:
    """Whether a model's quantized weights are still quantized after a forward pass; runs one token to find out.

    Some quantizers dequantize all weights in the first forward pass. Such a model cannot be saved in its format
    afterwards.
    """
    before = _types_and_shapes(model)
    with torch.inference_mode():
        model(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=model.device), use_cache=False)
    return _types_and_shapes(model) == before


def _types_and_shapes(model: nn.Module) -> dict[str, tuple[torch.dtype, torch.Size]]:
    """Type and shape of each tensor in a model's state dict."""
    return {name: (value.dtype, value.shape) for name, value in model.state_dict().items()}


def disable_cpu_kernel(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights when a model runs on a CPU, in place.

    bitsandbytes 0.50 has a kernel for CPUs with AVX512-BF16. At the first product it repacks the weights for this
    kernel and rounds their scales to bfloat16. For weights without double quantization the scales are not converted
    back, so `save_pretrained` would then write a different model. Disable the kernel for a model that is to be saved.
    """
    for module in _with_cpu_kernel(model):
        module.support_avx512bf16_for_cpu = False


def save_in_loaded_format(model: PreTrainedModel) -> None:
    """Let `save_pretrained` write quantized weights in the format in which they were loaded, in place.

    On saving, transformers 5.23 reverses every conversion that it applied on loading. It cannot reverse the ones that
    unpack quantized weights of bitsandbytes and torchao, and fails. This function removes those conversions.
    """
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is not None:
        reversible: Any = [each for each in conversions if _is_reversible(each)]
        model._weight_conversions = reversible


def _is_reversible(conversion: Any) -> bool:
    """Whether transformers can reverse a weight conversion."""
    try:
        conversion.reverse_transform()
    except NotImplementedError:
        return False
    return True


def enable_cpu_kernel(model: nn.Module) -> None:
    """Let bitsandbytes use its AVX512-BF16 kernel for the linear modules that it supports, in place.

    The kernel needs a number of outputs divisible by 32, and a number of inputs divisible by the quantization block
    size. bitsandbytes fails on other modules unless they are excluded here.
    """
    if not (modules := _with_cpu_kernel(model)):
        return
    from bitsandbytes.functional import has_avx512bf16

    supported = bool(has_avx512bf16())
    for module in modules:
        whole_blocks = module.in_features % module.weight.quant_state.blocksize == 0
        module.support_avx512bf16_for_cpu = supported and whole_blocks and module.out_features % 32 == 0


def _with_cpu_kernel(model: nn.Module) -> list[Any]:
    """The 4-bit modules of bitsandbytes, which have a switch for the CPU kernel."""
    return [module for module in model.modules() if hasattr(module, "support_avx512bf16_for_cpu")]
