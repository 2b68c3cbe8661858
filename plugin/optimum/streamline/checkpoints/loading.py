"""Reading and writing Hugging Face checkpoints: refuse what is broken, drop what is dead, never half a file.

This file knows nothing of how a model was changed; `record.py` says that beside the weights.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from optimum.streamline.errors import StreamlineError, first_line
from optimum.streamline.models.architectures import architecture_of
from optimum.streamline.models.bare_layers import bare_layers, host_config, is_bare_checkpoint, load_bare
from optimum.streamline.models.offloaded_weights import offload_options
from optimum.streamline.models.quantization_config import check_readable, quantization_name
from optimum.streamline.models.quantized_weights import disable_cpu_kernel, save_in_loaded_format
from optimum.streamline.models.skipped_sublayers import drop_skipped_sublayers

from .artifact import is_artifact
from .remote_code import code_note
from .saving import _check_finite
from .source import ModelSource
from .weight_files import CONFIG_FILE, FLOAT_TYPES, StoredTensor, WeightFiles, find_weights
from .wrong_folders import refuse_export, seems_to_be

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# safetensors' names of them.
_TYPES = {"F32": "fp32", "F16": "fp16", "BF16": "bf16"}


def read_config(source: ModelSource, of_export: bool = False) -> PreTrainedConfig:
    """The config of a checkpoint that can be handled.

    Args:
        of_export: Whether an export, whose folder has its checkpoint's config, will do.

    Raises:
        StreamlineError: it is not a model, or its architecture cannot be handled.
    """
    folder = source.folder
    if not (of_export and is_artifact(folder)):
        refuse_export(source)
    if not (folder / CONFIG_FILE).is_file():
        raise StreamlineError(
            f"model {source.model!r}: not a checkpoint folder, it has no {CONFIG_FILE}{seems_to_be(folder)}"
        )
    try:
        config = _config_of(source)
    except Exception as error:  # a wrong config raises whatever its class makes of it
        raise StreamlineError(f"model {source.model!r}: cannot be read ({first_line(error)})") from None
    architecture_of(config)
    bare_layers(config)
    return config


def check_checkpoint(source: ModelSource, of_export: bool = False) -> PreTrainedConfig:
    """The config of a checkpoint, whose files are looked at and whose weights are not read: for before any work.

    Args:
        of_export: As in `read_config`.

    Raises:
        StreamlineError: as `read_config`; or its weights are not there, or not of a type that its config speaks of.
    """
    config = read_config(source, of_export)
    if of_export and is_artifact(source.folder):
        return config
    weights = find_weights(source.folder)
    if quantization_name(config) is None:
        _check_types(source, weights.tensors())
    return config


def _config_of(source: ModelSource) -> PreTrainedConfig:
    fields, _ = PreTrainedConfig.get_config_dict(source.folder)
    if is_bare_checkpoint(fields):
        return host_config(fields)
    config: PreTrainedConfig = AutoConfig.from_pretrained(source.folder, trust_remote_code=source.trust_remote_code)
    return config


def load_stock(
    source: ModelSource,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    offload: Path | None = None,
    quantization: Any = None,
) -> PreTrainedModel:
    """Load a checkpoint as stock transformers does, skipped sublayers computed with their zeros; bare layers besides.

    Args:
        dtype: What to load in; the checkpoint's own by default, and always of one that is quantized.
        offload: Leave the weights on disk, as `offload_options` does with this folder.
        quantization: transformers' `quantization_config`, to quantize the weights as they are read.

    Raises:
        StreamlineError: a weight is missing, of the wrong shape, truncated or not finite.
    """
    config = check_checkpoint(source)
    check_device(device)
    weights = find_weights(source.folder)
    quantized = quantization is not None or quantization_name(config) is not None
    if quantization_name(config) is not None:
        check_readable(config, device)
    if quantized and offload:
        raise StreamlineError(f"model {source.model!r}: its weights are quantized, and cannot stay on disk")
    options: dict[str, Any] = {"dtype": "auto" if dtype is None or quantized else dtype}
    options |= offload_options(offload) if offload else {}
    if quantized:
        options["device_map"] = {"": device}  # where the numbers are is settled as they are made
    if quantization is not None:
        options["quantization_config"] = quantization
    model, info = _read_model(source, config, options | {"use_safetensors": not weights.pickled})
    _check_keys(source, info)
    _check_finite(source.model, model)
    if quantized:
        disable_cpu_kernel(model)
        save_in_loaded_format(model)
    module: nn.Module = model  # transformers' own `to` carries no types
    if not offload and not quantized:
        module.to(device)
    module.eval()
    return model


def source_notes(source: ModelSource, config: PreTrainedConfig) -> list[str]:
    """What a user must know of how a model is read, in lines: whose code runs, and what its files were made into."""
    used: Any = MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[config.model_type]]
    notes = [code_note(source, used.__name__)]
    if base := source.base:
        notes.append(f"{source.model} is an adapter: merged into its base {base.model}")
    if is_artifact(source.folder):
        return []
    weights = find_weights(source.folder)
    if weights.pickled:
        names = ", ".join(file.name for file in weights.files)
        notes.append(
            f"weights are read from {names}, by torch and as tensors alone (weights_only): no code of theirs runs"
        )
    if len(types := _float_sizes(weights)) > 1 and quantization_name(config) is None:
        names = " and ".join(types)
        notes.append(
            f"its weights are stored in {names}; what is made of it is stored in {next(iter(types))}, as most are"
        )
    return [note for note in notes if note]


def check_device(device: str) -> None:
    """Refuse a device that torch cannot compute on here.

    Raises:
        StreamlineError: naming it.
    """
    if device not in ("cpu", "cuda"):
        raise StreamlineError(f"device {device!r}: unknown; one of cpu, cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise StreamlineError("device 'cuda': this machine or this build of torch has none; use 'cpu'")


def _read_model(source: ModelSource, config: PreTrainedConfig, options: dict[str, Any]) -> tuple[PreTrainedModel, Any]:
    """A model, and what transformers says of the weights it found."""
    # Weights of another shape are named by us, in one line.
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    loaded: Any
    try:
        if bare_layers(config):
            loaded = load_bare(str(source.folder), config, **options)
        else:
            trusted = source.trust_remote_code
            loaded = AutoModelForCausalLM.from_pretrained(source.folder, trust_remote_code=trusted, **options)
    except Exception as error:  # safetensors and the libraries of quantizers each raise their own
        raise StreamlineError(f"model {source.model!r}: cannot be loaded ({first_line(error)})") from None
    model, info = loaded
    return model, info


_FAULTS = {
    "missing_keys": "are missing in its files: the checkpoint is not whole, fetch or save it again",
    "mismatched_keys": "have another shape than config.json says: the weights are of another model",
    "unexpected_keys": (
        "are in its files and not in the model that config.json describes, such as a value head or an adapter beside "
        "it: save the language model alone"
    ),
}


def _check_keys(source: ModelSource, info: dict[str, Any]) -> None:
    for fault, meaning in _FAULTS.items():
        names = sorted(str(name[0] if isinstance(name, tuple) else name) for name in info[fault])
        # A constant that GPT-2's files once held: no weight, and no model has it any more.
        if names := [name for name in names if not name.endswith(".masked_bias")]:
            raise StreamlineError(f"model {source.model!r}: {len(names)} weights, first {names[0]!r}, {meaning}")


def _check_types(source: ModelSource, tensors: Iterable[StoredTensor]) -> None:
    for tensor in tensors:
        # Masks and positions that old checkpoints keep beside their weights are of other types: those have four
        # dimensions, or a name of their own.
        weight = 1 <= len(tensor.shape) <= 3 and not tensor.name.endswith("position_ids")
        if weight and tensor.type not in FLOAT_TYPES:
            raise StreamlineError(
                f"model {source.model!r}: weight {tensor.name} is {tensor.type}, and config.json says nothing of "
                "quantization; give float weights, or a config.json that says how they are quantized"
            )


def load(
    path: str, dtype: torch.dtype | None = None, device: str = "cpu", offload: Path | None = None, **options: Any
) -> PreTrainedModel:
    """Load a checkpoint with its skipped sublayers dropped: no matrix product, no cache entry.

    The only way to load one that has a bare feed-forward network for a layer, which stock transformers refuses.

    Args:
        path: A checkpoint's folder or Hub id, ours or not.
        dtype: What to load in; the checkpoint's own by default.
        offload: Leave the weights on disk, as `offload_options` does with this folder.
        options: `cache_dir`, `trust_remote_code`, `revision`.

    Returns:
        A `transformers` model in evaluation mode, with the function that stock transformers computes where it can.

    Raises:
        StreamlineError: the checkpoint cannot be handled, or a weight is missing or not finite.
    """
    model = load_stock(ModelSource(path, **options), dtype, device, offload)
    return drop_skipped_sublayers(model, architecture_of(model.config))


def stored_dtype(source: ModelSource) -> str:
    """The name in `DTYPES` of what most of a checkpoint's float weights are stored in, whatever its config says.

    Raises:
        StreamlineError: it has no weights of such a type.
    """
    if not (sizes := _float_sizes(find_weights(source.folder))):
        raise StreamlineError(f"model {source.model!r}: has no weights in one of {', '.join(DTYPES)}; convert it first")
    return next(iter(sizes))


def _float_sizes(weights: WeightFiles) -> dict[str, int]:
    """Bytes of the weights of each type of `DTYPES` that a checkpoint has, the most first."""
    sizes: Counter[str] = Counter()
    for tensor in weights.tensors():
        if tensor.type in _TYPES:
            sizes[_TYPES[tensor.type]] += tensor.bytes
    return dict(sizes.most_common())


def load_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer.

    Raises:
        StreamlineError: it has none.
    """
    try:
        trusted = source.trust_remote_code
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source.folder, trust_remote_code=trusted)
    except Exception as error:
        raise StreamlineError(f"model {source.model!r}: no tokenizer ({first_line(error)})") from None
    return tokenizer
