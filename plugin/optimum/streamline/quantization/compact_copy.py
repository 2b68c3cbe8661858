"""Copies of a model for computation alone, whose weights take less memory: two bytes, one, or half a byte each."""

from __future__ import annotations

import logging
from typing import cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from optimum.streamline.errors import require_extra
from optimum.streamline.models.offloaded_weights import copy_by_layers
from optimum.streamline.models.quantized_weights import disable_cpu_kernel

OUTLIERS = 6.0
"""Inputs of at least this size are multiplied in fp16 (LLM.int8, arXiv 2208.07339, section 3.2)."""


def compact_copy(model: PreTrainedModel, form: str, device: str) -> PreTrainedModel:
    """A copy of a model that computes in bf16, but for the products of `int8`. It has no gradients of its own.

    Weights that are not in linear modules of the decoder layers are in bf16: embeddings, norms, biases, the output head
    and the stacked weights of experts. Besides the copy, one tensor, or a layer twice, is in memory in fp32.

    Args:
        model: The model, in memory or with its weights on disk; it is unchanged.
        form: The weights of linear modules: `bf16`, or by bitsandbytes `int8`, with products of 8-bit integers but for
            outliers (LLM.int8, arXiv 2208.07339), or `nf4`, 4-bit NormalFloat (arXiv 2305.14314).
        device: `cpu` or `cuda`.

    Raises:
        StreamlineError: bitsandbytes is not installed, and the form needs it.
    """
    copied = copy_by_layers(
        model,
        lambda layer: _compact(layer, form, device),
        lambda value: value.to(device, torch.bfloat16),
    )
    nn.Module.to(copied, device)  # the buffers; the method of transformers refuses modules of bitsandbytes
    disable_cpu_kernel(copied)  # it cannot compute every size, and rounds more
    copied.requires_grad_(False).eval()
    return copied


def _compact(layer: nn.Module, form: str, device: str) -> nn.Module:
    for parameter in layer.parameters():  # not buffers: the frequencies of rotary embeddings would lose too much
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(torch.bfloat16)
    if form != "bf16":
        for name, module in list(layer.named_modules()):
            if isinstance(module, (nn.Linear, Conv1D)):
                layer.set_submodule(name, _quantized(module, form))
    return layer.to(device)  # where bitsandbytes quantizes


def _quantized(module: nn.Linear | Conv1D, form: str) -> nn.Module:
    """A linear module of bitsandbytes with the same weights, which are quantized once it is moved to a device."""
    bnb = require_extra("bitsandbytes.nn", "bitsandbytes")
    weight = module.weight.data.T.contiguous() if isinstance(module, Conv1D) else module.weight.data
    outputs, inputs = weight.shape
    if form == "nf4":
        made = bnb.Linear4bit(inputs, outputs, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
        made.weight = bnb.Params4bit(weight, requires_grad=False, quant_type="nf4")
    else:
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)  # it warns at each product
        made = bnb.Linear8bitLt(inputs, outputs, bias=False, has_fp16_weights=False, threshold=OUTLIERS)
        made.weight = bnb.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    made.bias = module.bias
    return cast(nn.Module, made)
