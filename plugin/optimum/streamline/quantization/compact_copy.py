"""Copies of a model for computation alone, whose weights take less memory: two bytes, one, or half a byte each."""

from __future__ import annotations

import copy
from typing import cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from optimum.streamline.errors import require_extra
from optimum.streamline.models.architectures import architecture_of, decoder_layers
from optimum.streamline.models.offloaded_weights import copy_in_memory, weights_on_disk
from optimum.streamline.models.quantized_weights import disable_cpu_kernel


def compact_copy(model: PreTrainedModel, form: str, device: str) -> PreTrainedModel:
    """A copy of a model that computes in bf16. Besides the copy, one layer of the model is in memory at a time.

    Weights that are not in linear modules of the decoder layers are in bf16: embeddings, norms, biases, the output head
    and the stacked weights of experts.

    Args:
        model: The model, in memory or with its weights on disk; it is unchanged.
        form: The weights of linear modules: `bf16`, or by bitsandbytes `int8`, or `nf4` for 4-bit NormalFloat.
        device: `cpu` or `cuda`.

    Raises:
        StreamlineError: bitsandbytes is not installed, and the form needs it.
    """
    layers = list(decoder_layers(model, architecture_of(model.config)))
    whole = [each for layer in layers for each in layer.modules()]
    rest = copy.deepcopy(model, {id(each): each for each in (*whole, *weights_on_disk(model))})
    compact = [_compact(copy_in_memory(layer), form, device) for layer in layers]
    own = decoder_layers(rest, architecture_of(model.config))
    for number, layer in enumerate(compact):
        own[number] = layer
    copied = cast(PreTrainedModel, copy_in_memory(rest, [each for layer in compact for each in layer.modules()]))
    _cast(copied)
    copied.tie_weights()
    disable_cpu_kernel(copied)  # it cannot compute every size, and rounds more
    nn.Module.to(copied, device)  # that of transformers refuses modules of bitsandbytes
    copied.requires_grad_(False).eval()
    return copied


def _compact(layer: nn.Module, form: str, device: str) -> nn.Module:
    _cast(layer)
    if form != "bf16":
        for name, module in list(layer.named_modules()):
            if isinstance(module, (nn.Linear, Conv1D)):
                layer.set_submodule(name, _quantized(module, form))
    return layer.to(device)  # where bitsandbytes quantizes


def _cast(module: nn.Module) -> None:
    """Cast parameters to bf16, but not buffers: the frequencies of rotary embeddings would lose too much."""
    for parameter in module.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(torch.bfloat16)


def _quantized(module: nn.Linear | Conv1D, form: str) -> nn.Module:
    """A linear module of bitsandbytes with the same weights, which are quantized once it is moved to a device."""
    bnb = require_extra("bitsandbytes.nn", "bitsandbytes")
    weight = module.weight.data.T.contiguous() if isinstance(module, Conv1D) else module.weight.data
    outputs, inputs = weight.shape
    if form == "nf4":
        made = bnb.Linear4bit(inputs, outputs, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
        made.weight = bnb.Params4bit(weight, requires_grad=False, quant_type="nf4")
    else:
        made = bnb.Linear8bitLt(inputs, outputs, bias=False, has_fp16_weights=False)
        made.weight = bnb.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    made.bias = module.bias
    return cast(nn.Module, made)
