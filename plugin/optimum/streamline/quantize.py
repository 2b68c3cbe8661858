"""From a checkpoint to a quantized one: load by a quantizer of the table, save, say what was done.

Knows nothing of layers being removed; `prune.py` calls this before or after.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.quantizers.base import get_keys_to_not_convert

from .bare_layers import bare_layers
from .checkpoint import (
    DTYPES,
    RECORD_FILE,
    Source,
    fingerprint,
    load_stock,
    load_tokenizer,
    local_folder,
    read_config,
    save_model,
    stored_dtype,
    weight_bytes,
)
from .errors import StreamlineError
from .logs import LOG_FILE, captured_logs
from .module_patterns import chosen
from .outputs import staged_folder
from .quantization_config import quantization_name
from .quantized import quantized_modules
from .quantizers import check_quantizer

QUANTIZATION_FILE = "quantization.json"

Say = Callable[[str], None]


def quantize(
    source: Source,
    out: Path,
    how: str,
    exclude: Sequence[str] = (),
    *,
    device: str = "cpu",
    overwrite: bool = False,
    verbose: bool = False,
    say: Say = print,
) -> None:
    """Make the quantized checkpoint `out`: whole, or not at all.

    Args:
        how: A key of `quantizers.QUANTIZERS`.
        exclude: What to leave in float: numbers of layers, and names of modules in which `*` stands for anything.
        device: Where it is quantized, and for `torchao-int4` where it can be run.

    Raises:
        StreamlineError: the model or the quantizer cannot be used, or `out` cannot be written.
    """
    check_quantizable(read_config(source), how, exclude)
    with staged_folder(out, (source.model,), overwrite) as folder, captured_logs(folder / LOG_FILE, verbose):
        write_quantized(source, folder, how, exclude, device)
        before, after = (weight_bytes(each) / 1e6 for each in (local_folder(source), folder))
    say(f"quantized ({how}): {before:.1f} MB became {after:.1f} MB")
    say(f"saved {out}")


def check_quantizable(config: PreTrainedConfig, how: str, exclude: Sequence[str] = ()) -> list[str]:
    """Refuse a model that a quantizer cannot take, before a weight is read.

    Returns:
        The modules that stay in float.

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
    with torch.device("meta"):
        skeleton: Any = AutoModelForCausalLM.from_config(config)
    linear = (nn.Linear, transformers.pytorch_utils.Conv1D)
    products = {name: module for name, module in skeleton.named_modules() if isinstance(module, linear)}
    kept = sorted({*get_keys_to_not_convert(skeleton), *chosen(products, exclude)})
    _check_groups(how, {name: module for name, module in products.items() if name not in kept})
    return kept


def write_quantized(source: Source, folder: Path, how: str, exclude: Sequence[str], device: str) -> None:
    """Write the checkpoint at `source`, quantized, into `folder`, with the record of its making if it has one.

    Raises:
        StreamlineError: an exclusion names nothing, or nothing would be quantized.
    """
    model = load_quantizing(source, how, exclude, device)
    save_model(model, load_tokenizer(source), None, folder)
    write_quantization(model, source, how, exclude, folder)
    if (Path(source.model) / RECORD_FILE).is_file():
        shutil.copy(Path(source.model) / RECORD_FILE, folder)


def load_quantizing(source: Source, how: str, exclude: Sequence[str], device: str) -> PreTrainedModel:
    """Load a float checkpoint with its weights quantized as they are read.

    Raises:
        StreamlineError: an exclusion names nothing, or nothing would be quantized.
    """
    config = read_config(source)
    kept = check_quantizable(config, how, exclude)
    quantization = check_quantizer(how).config(kept, DTYPES[stored_dtype(config)], device)
    model = load_stock(source, None, device, quantization=quantization)
    if not quantized_modules(model):
        raise StreamlineError(f"quantize {how!r}: nothing of this model would be quantized; exclude less")
    return model


def _check_groups(how: str, products: dict[str, nn.Module]) -> None:
    group = check_quantizer(how).group
    for name, module in products.items():
        depth = module.in_features if isinstance(module, nn.Linear) else 0
        if depth % group:
            raise StreamlineError(
                f"quantize {how!r}: {name} multiplies {depth} numbers, which are not whole groups of {group}; "
                f"quantize-exclude it, or use another quantizer"
            )


def write_quantization(model: PreTrainedModel, source: Source, how: str, exclude: Sequence[str], folder: Path) -> None:
    """Write `quantization.json`: what was quantized, by what, and what was not."""
    from . import __version__

    quantized = set(quantized_modules(model))
    linear = (name for name, module in model.named_modules() if isinstance(module, nn.Linear))
    fields = {
        "quantize": how,
        "quantize_exclude": list(exclude),
        "source": {"model": source.model, "fingerprint": fingerprint(source.model, source.cache_dir)},
        "quantized": len(quantized),
        "float": [name for name in linear if name not in quantized],
        "versions": {
            "optimum-streamline": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    (folder / QUANTIZATION_FILE).write_text(json.dumps(fields, indent=1) + "\n")
