"""Loading a float checkpoint with its weights quantized as they are read, and the checks before it."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.quantizers.base import get_keys_to_not_convert

from optimum.streamline.checkpoints.loading import (
    DTYPES,
    load_stock,
    stored_dtype,
)
from optimum.streamline.checkpoints.source import ModelSource
from optimum.streamline.errors import StreamlineError
from optimum.streamline.models.bare_layers import bare_layers
from optimum.streamline.models.linear_modules import LinearModule, linear_modules_of, meta_model
from optimum.streamline.models.module_patterns import select_modules
from optimum.streamline.models.quantization_config import quantization_name
from optimum.streamline.models.quantized_weights import quantized_modules

from .quantizers import check_quantizer


def check_quantizable(config: PreTrainedConfig, how: str, exclude: Sequence[str] = ()) -> list[str]:
    """Refuse a model that a quantizer cannot take, before a weight is read.

    Returns:
        The modules that are to stay in float.

    Raises:
        StreamlineError: it is quantized already, or has bare layers, or weights of a wrong width; there is no such
            quantizer; or an exclusion names nothing.
    """
    check_quantizer(how)
    name = quantization_name(config)
    if name is not None:
        raise StreamlineError(f"quantize {how!r}: the model is quantized already ({name}); give the float weights")
    if bare_layers(config):
        raise StreamlineError(
            f"quantize {how!r}: a bare feed-forward network stands for some layers, and transformers, which would "
            "quantize it, cannot load that; export the model to ONNX and quantize there"
        )
    skeleton = meta_model(config)
    products = linear_modules_of(skeleton)
    kept = sorted({*get_keys_to_not_convert(skeleton), *select_modules(products, exclude)})
    _check_groups(how, {name: product for name, product in products.items() if name not in kept})
    return kept


def load_quantizing(source: ModelSource, how: str, kept: Sequence[str], device: str) -> PreTrainedModel:
    """Load a float checkpoint with its weights quantized as they are read.

    Args:
        kept: The names of the modules that stay in float.

    Raises:
        StreamlineError: nothing would be quantized.
    """
    dtype = DTYPES[stored_dtype(source)]
    quantization = check_quantizer(how).config(kept, dtype, device)
    model = load_stock(source, None, device, quantization=quantization)
    if not quantized_modules(model):
        raise StreamlineError(f"quantize {how!r}: nothing of this model would be quantized; exclude less")
    return model


def _check_groups(how: str, products: dict[str, LinearModule]) -> None:
    group = check_quantizer(how).group
    for name, product in products.items():
        if product.depth % group:
            raise StreamlineError(
                f"quantize {how!r}: {name} multiplies {product.depth} numbers, which are not whole groups of {group}; "
                f"quantize-exclude it, or use another quantizer"
            )
