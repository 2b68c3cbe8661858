"""Load Hugging Face checkpoints, with skipped sublayers dropped, and refuse broken ones with a clear message."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from contextlib import nullcontext
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
from optimum.streamline.model_files.artifact import is_artifact
from optimum.streamline.model_files.remote_code import code_note
from optimum.streamline.model_files.source import ModelSource
from optimum.streamline.model_files.weight_files import (
    CONFIG_FILE,
    FLOAT_TYPES,
    StoredTensor,
    WeightFiles,
    find_weights,
)
from optimum.streamline.model_files.wrong_folders import guess_folder_kind, refuse_export
from optimum.streamline.models.architectures import architecture_of
from optimum.streamline.models.bare_layers import bare_layers, host_config, is_bare_checkpoint, load_bare
from optimum.streamline.models.offloaded_weights import (
    compute_on,
    offload_options,
    read_in_fp32,
    read_only_used_embeddings,
    read_without_mapping,
)
from optimum.streamline.models.quantization_config import check_readable, quantization_name
from optimum.streamline.models.quantized_weights import disable_cpu_kernel, save_in_loaded_format
from optimum.streamline.models.skipped_sublayers import drop_skipped_sublayers
from optimum.streamline.system.memory import give_back_freed_tensors

from .finite_weights import check_finite_weights

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# The names of these types in safetensors files.
_TYPES = {"F32": "fp32", "F16": "fp16", "BF16": "bf16"}


def read_config(source: ModelSource, of_export: bool = False) -> PreTrainedConfig:
    """Read the config of a checkpoint.

    Args:
        source: The model.
        of_export: Whether an artifact is accepted too. Its folder has the config of its checkpoint.

    Returns:
        The config. Its architecture is supported.

    Raises:
        StreamlineError: the folder is no checkpoint, its config is broken, or its architecture is not supported.
    """
    folder = source.folder
    if not (of_export and is_artifact(folder)):
        refuse_export(source)
    if not (folder / CONFIG_FILE).is_file():
        raise StreamlineError(
            f"model {source.model!r}: not a checkpoint folder, it has no {CONFIG_FILE}{guess_folder_kind(folder)}"
        )
    try:
        config = _config_of(source)
    except Exception as error:  # a config class may raise anything on wrong fields
        raise StreamlineError(f"model {source.model!r}: cannot be read ({first_line(error)})") from None
    architecture_of(config)
    bare_layers(config)
    return config


def check_checkpoint(source: ModelSource, of_export: bool = False) -> PreTrainedConfig:
    """Check the config and the headers of the weight files, without reading weights.

    Commands call this before any work.

    Args:
        source: The model.
        of_export: Whether an artifact is accepted too. Its weights are not checked.

    Returns:
        The config.

    Raises:
        StreamlineError: as `read_config`; or weight files are missing or broken; or a weight is not of a float type
            although the config names no quantization.
    """
    config = read_config(source, of_export)
    if of_export and is_artifact(source.folder):
        return config
    weights = find_weights(source.folder)
    if quantization_name(config) is None:
        _check_types(source, weights.tensors())
    return config


def _config_of(source: ModelSource) -> PreTrainedConfig:
    """Read the config, or the host's config for a checkpoint with bare layers."""
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
    check_weights: bool = True,
) -> PreTrainedModel:
    """Load a checkpoint as stock transformers does. Skipped sublayers stay in the model and compute with their zeros.

    Checkpoints with bare layers load too, although stock transformers refuses them.

    Args:
        source: The model.
        dtype: The type to load in; by default the checkpoint's own. Ignored for a quantized model.
        device: `cpu` or `cuda`.
        offload: A folder for `offload_options`. If given, the weights stay on disk.
        quantization: A `quantization_config` of transformers, to quantize the weights while they are loaded.
        check_weights: Whether weights that are not finite are refused. Not needed if they were checked before.

    Returns:
        The model in evaluation mode.

    Raises:
        StreamlineError: a weight is missing, truncated, not finite or of the wrong shape; or the device cannot be used.
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
        options["device_map"] = {"": device}  # quantized weights must be created on their device
    if quantization is not None:
        options["quantization_config"] = quantization
    model, info = _read_model(source, config, options | {"use_safetensors": not weights.pickled})
    _check_keys(source, info)
    if check_weights:
        check_finite_weights(source.model, model)
    if quantized:
        disable_cpu_kernel(model)
        save_in_loaded_format(model)
    module: nn.Module = model  # for mypy: the `to` of PreTrainedModel is not typed
    if not offload and not quantized:
        module.to(device)
    module.eval()
    return model


def load_on_disk(
    source: ModelSource, folder: Path, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> PreTrainedModel:
    """Load a model whose weights stay on disk: each module reads its own just before it runs.

    Args:
        source: The model.
        folder: A folder for weights that are converted or changed. It must exist as long as the model.
        dtype: The type in which weights are read: fp32, or the type of `only_dtype`.
        device: The device on which the model computes, `cpu` or `cuda`.

    Raises:
        StreamlineError: a weight is missing, truncated, not finite or of the wrong shape.
    """
    give_back_freed_tensors()
    # Each weight is read once on the way. In its own type it takes no more memory than on disk.
    model = load_stock(source, only_dtype(source), "cpu", folder)
    if dtype == torch.float32:
        read_in_fp32(model)
    read_only_used_embeddings(model)
    if device != "cpu":
        compute_on(model, device)
    return model


def source_notes(source: ModelSource, config: PreTrainedConfig) -> list[str]:
    """What a user should know about how a model is loaded.

    Args:
        source: The model.
        config: Its config.

    Returns:
        Lines about code in the checkpoint and whether it runs, the base of an adapter, pickled weights, and mixed
        dtypes.
    """
    used: Any = MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[config.model_type]]
    notes = [code_note(source, used.__name__)]
    if base := source.base:
        notes.append(f"{source.model} is an adapter: merged into its base model {base.model!r}")
    if is_artifact(source.folder):
        return []
    weights = find_weights(source.folder)
    if weights.pickled:
        names = ", ".join(file.name for file in weights.files)
        notes.append(f"weights are read from {names} with torch.load(weights_only=True), so no code in them runs")
    if len(types := _float_sizes(weights)) > 1 and quantization_name(config) is None:
        names = " and ".join(types)
        notes.append(
            f"its weights are stored in {names}; the output is stored in {next(iter(types))}, as most of them are"
        )
    return [note for note in notes if note]


def check_device(device: str) -> None:
    """Refuse a device that torch cannot use on this machine.

    Raises:
        StreamlineError: the device is unknown or not available.
    """
    if device not in ("cpu", "cuda"):
        raise StreamlineError(f"device {device!r}: unknown; one of cpu, cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise StreamlineError("device 'cuda': torch finds no GPU on this machine, or was built without CUDA; use 'cpu'")


def _read_model(source: ModelSource, config: PreTrainedConfig, options: dict[str, Any]) -> tuple[PreTrainedModel, Any]:
    """Load a model.

    Returns:
        The model, and transformers' `loading_info` about missing, unexpected and mismatched weights.
    """
    # With this option transformers reports weights of the wrong shape instead of raising. `_check_keys` names them.
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    loaded: Any
    on_disk = "offload_folder" in options
    try:
        with read_without_mapping() if on_disk else nullcontext():
            if bare_layers(config):
                loaded = load_bare(str(source.folder), config, **options)
            else:
                trusted = source.trust_remote_code
                loaded = AutoModelForCausalLM.from_pretrained(source.folder, trust_remote_code=trusted, **options)
    except Exception as error:  # safetensors and the quantization libraries raise exceptions of their own
        raise StreamlineError(f"model {source.model!r}: cannot be loaded ({first_line(error)})") from None
    model, info = loaded
    return model, info


_FAULTS = {
    "missing_keys": "are missing in its files: the checkpoint is incomplete, fetch or save it again",
    "mismatched_keys": (
        "do not have the shape that config.json gives; use the config.json of the model that the weights come from"
    ),
    "unexpected_keys": (
        "are in its files but not in the model that config.json describes (such as a value head or an adapter); save "
        "the language model alone"
    ),
}


def _check_keys(source: ModelSource, info: dict[str, Any]) -> None:
    """Refuse a checkpoint with missing, unexpected or mismatched weights."""
    for fault, meaning in _FAULTS.items():
        names = sorted(str(name[0] if isinstance(name, tuple) else name) for name in info[fault])
        # Old GPT-2 checkpoints hold this constant. It is not a weight, and no current model has it.
        if names := [name for name in names if not name.endswith(".masked_bias")]:
            raise StreamlineError(f"model {source.model!r}: {len(names)} weights, first {names[0]!r}, {meaning}")


def _check_types(source: ModelSource, tensors: Iterable[StoredTensor]) -> None:
    """Refuse weights that are not of a float type in a checkpoint whose config names no quantization."""
    for tensor in tensors:
        # Old checkpoints also store attention masks, which have four dimensions, and position ids. These are no
        # weights.
        weight = 1 <= len(tensor.shape) <= 3 and not tensor.name.endswith("position_ids")
        if weight and tensor.type not in FLOAT_TYPES:
            raise StreamlineError(
                f"model {source.model!r}: weight {tensor.name} holds {tensor.type}, which is not a float type, but "
                "config.json has no quantization_config; give float weights, or add the quantization_config"
            )


def load(
    path: str, dtype: torch.dtype | None = None, device: str = "cpu", offload: Path | None = None, **options: Any
) -> PreTrainedModel:
    """Load a checkpoint with its skipped sublayers dropped: they compute no matrix product and have no cache entry.

    This is the only way to load a model with bare layers. Stock transformers refuses those.

    Args:
        path: A checkpoint's folder or Hub id, made by this program or any other.
        dtype: The type to load in; by default the checkpoint's own.
        device: `cpu` or `cuda`.
        offload: A folder for `offload_options`. If given, the weights stay on disk.
        options: `cache_dir`, `trust_remote_code`, `revision`, as in `ModelSource`.

    Returns:
        A transformers model in evaluation mode. It computes the same as in stock transformers, where that can load it.

    Raises:
        StreamlineError: the architecture is not supported, or a weight is missing or not finite.
    """
    model = load_stock(ModelSource(path, **options), dtype, device, offload)
    return drop_skipped_sublayers(model, architecture_of(model.config))


def only_dtype(source: ModelSource) -> torch.dtype:
    """The type in which all of a checkpoint's float weights are stored; fp32, which holds any, if there are several."""
    types = {tensor.type for tensor in find_weights(source.folder).tensors()} & FLOAT_TYPES
    return DTYPES[_TYPES[types.pop()]] if len(types) == 1 and types <= _TYPES.keys() else torch.float32


def stored_dtype(source: ModelSource) -> str:
    """The type in which most of a checkpoint's float weights are stored, even if its config names another.

    Returns:
        A key of `DTYPES`.

    Raises:
        StreamlineError: no weight is stored in one of these types.
    """
    if not (sizes := _float_sizes(find_weights(source.folder))):
        raise StreamlineError(
            f"model {source.model!r}: none of its weights is stored in {', '.join(DTYPES)}, the supported dtypes; "
            "convert them first"
        )
    return next(iter(sizes))


def _float_sizes(weights: WeightFiles) -> dict[str, int]:
    """Bytes of a checkpoint's weights by key of `DTYPES`, largest first."""
    sizes: Counter[str] = Counter()
    for tensor in weights.tensors():
        if tensor.type in _TYPES:
            sizes[_TYPES[tensor.type]] += tensor.bytes
    return dict(sizes.most_common())


def load_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    """Load the checkpoint's tokenizer.

    Raises:
        StreamlineError: there is none, or it cannot be loaded.
    """
    try:
        trusted = source.trust_remote_code
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source.folder, trust_remote_code=trusted)
    except Exception as error:
        raise StreamlineError(f"model {source.model!r}: no tokenizer ({first_line(error)})") from None
    return tokenizer
