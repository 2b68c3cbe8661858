"""Dequantizing a checkpoint: writing it again with float weights of the same values.

Graph tracing and other readers of float weights need this. The rounding errors of quantization stay.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from optimum.streamline.checkpoints.loading import load_stock, read_config
from optimum.streamline.checkpoints.saving import save_weights
from optimum.streamline.errors import StreamlineError
from optimum.streamline.model_files.source import ModelSource
from optimum.streamline.models.linear_modules import meta_model
from optimum.streamline.models.quantization_config import float_config, quantization_name
from optimum.streamline.models.quantized_weights import float_values, quantized_modules


def write_dequantized(source: ModelSource, folder: Path) -> None:
    """Write the quantized checkpoint at `source` into `folder` with float weights, without its tokenizer.

    Args:
        source: The quantized checkpoint.
        folder: The folder to write into.

    Raises:
        StreamlineError: the quantizer is neither bitsandbytes nor torchao.
    """
    model = load_stock(source)
    names = quantized_modules(model)
    if not names:
        name = quantization_name(read_config(source))
        raise StreamlineError(
            f"model {source.model!r}: its weights are quantized ({name}), and only bitsandbytes and torchao weights "
            "can be dequantized; give the float weights"
        )
    skeleton = meta_model(float_config(model.config))
    for name in names:
        model.set_submodule(name, _float_module(model.get_submodule(name), skeleton.get_submodule(name)))
    _forget_quantization(model)
    save_weights(model, folder)


def _float_module(module: nn.Module, like: nn.Module) -> nn.Module:
    """Fill `like`, a float module without weights, with the dequantized weight and the bias of `module`."""
    weight: Any = module.weight
    bias: Any = module.bias
    values = float_values(module, weight).to(weight.device)
    if isinstance(like, Conv1D):  # its weight is [inputs, outputs]
        values = values.T.contiguous()
    like.weight = nn.Parameter(values, requires_grad=False)
    like.bias = bias
    return like


def _forget_quantization(model: PreTrainedModel) -> None:
    untyped: Any = model  # these attributes are not in transformers' types
    untyped.hf_quantizer, untyped.is_quantized, untyped.quantization_method = None, False, None
    untyped.is_loaded_in_4bit = untyped.is_loaded_in_8bit = False
    model.config = float_config(model.config)
