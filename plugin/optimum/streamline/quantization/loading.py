"""Loading a float checkpoint with a quantizer that quantizes its weights as they are read."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.quantizers.base import get_keys_to_not_convert

from optimum.streamline.checkpoints.loading import DTYPES, load_stock, stored_dtype
from optimum.streamline.errors import StreamlineError
from optimum.streamline.model_files.source import ModelSource
from optimum.streamline.models.bare_layers import bare_layers
from optimum.streamline.models.linear_modules import LinearModule, linear_modules_of, meta_model
from optimum.streamline.models.module_patterns import select_modules
from optimum.streamline.models.quantization_config import quantization_name
from optimum.streamline.models.quantized_weights import quantized_modules

from .quantizers import check_quantizer


def check_quantizable(config: PreTrainedConfig, quantizer: str, exclude: Sequence[str] = ()) -> list[str]:
    """Refuse a model that a quantizer cannot quantize, before any weight is read.

    Args:
        config: The model's config.
        quantizer: A name in `QUANTIZERS`.
        exclude: Patterns of modules to keep in float (`models.module_patterns`).

    Returns:
        The names of the modules that stay in float.

    Raises:
        StreamlineError: there is no such quantizer, the model is quantized already, it has bare layers, a weight does
            not divide into whole groups, or a pattern matches no module.
    """
    check_quantizer(quantizer)
    name = quantization_name(config)
    if name is not None:
        raise StreamlineError(
            f"quantize {quantizer!r}: the model is quantized already ({name}); give the float weights"
        )
    if bare_layers(config):
        raise StreamlineError(
            f"quantize {quantizer!r}: the model has bare layers (replacement ffn or swiglu), which transformers cannot "
            "load; export it to ONNX and quantize the graph"
        )
    skeleton = meta_model(config)
    modules = linear_modules_of(skeleton)
    kept = sorted({*get_keys_to_not_convert(skeleton), *select_modules(modules, exclude)})
    _check_groups(quantizer, {name: module for name, module in modules.items() if name not in kept})
    return kept


def load_quantizing(source: ModelSource, quantizer: str, kept: Sequence[str], device: str) -> PreTrainedModel:
    """Load a float checkpoint, and quantize its weights as they are read.

    Args:
        source: The float checkpoint.
        quantizer: A name in `QUANTIZERS`.
        kept: The names of the modules that stay in float, from `check_quantizable`.
        device: `cpu` or `cuda`.

    Raises:
        StreamlineError: no module would be quantized.
    """
    dtype = DTYPES[stored_dtype(source)]
    quantization = check_quantizer(quantizer).config(kept, dtype, device)
    model = load_stock(source, None, device, quantization=quantization)
    if not quantized_modules(model):
        raise StreamlineError(
            f"quantize {quantizer!r}: no module of this model would be quantized; exclude fewer modules"
        )
    return model


def _check_groups(quantizer: str, modules: dict[str, LinearModule]) -> None:
    group = check_quantizer(quantizer).group
    for name, module in modules.items():
        if module.depth % group:
            raise StreamlineError(
                f"quantize {quantizer!r}: {name} has {module.depth} inputs, not a multiple of {group}; "
                f"exclude it by quantize-exclude, or use another quantizer"
            )
