"""Reading and writing Hugging Face checkpoints: refuse what is broken, drop what is dead, never half a file.

This file knows nothing of how a model was changed; `record.py` says that beside the weights.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .anatomy import architecture_of
from .bare_layers import bare_layers, host_config, is_bare_checkpoint, load_bare, save_bare
from .dead import drop_dead_sublayers
from .errors import StreamlineError
from .offload import offload_options, read_parameter
from .older_names import add_older_names
from .older_tokenizers import save_tokenizer
from .quantization_config import quantization_name
from .quantized import keep_as_read, save_as_read

RECORD_FILE = "streamline.json"
RECORD_KEYS = ("source", "layers", "scores", "recipe_fingerprint", "data")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
HUB_PATTERNS = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt")
WEIGHT_PATTERNS = ("*.safetensors", "*.safetensors.index*.json")


@dataclass(frozen=True)
class Source:
    """Where a model is read from, and with what leave.

    Args:
        model: A checkpoint's folder, or a Hub id.
        cache_dir: Where Hub downloads are kept; transformers' own place by default.
        trust_remote_code: Whether code from the checkpoint may run.
    """

    model: str
    cache_dir: str | None = None
    trust_remote_code: bool = False

    def options(self) -> dict[str, Any]:
        """Keyword arguments for transformers' `from_pretrained`."""
        return {"cache_dir": self.cache_dir, "trust_remote_code": self.trust_remote_code}


def read_config(source: Source) -> PreTrainedConfig:
    """The config of a checkpoint that can be handled.

    Raises:
        StreamlineError: it is not a model, or its architecture cannot be handled.
    """
    folder = Path(source.model)
    if folder.exists() and not (folder / "config.json").is_file():
        raise StreamlineError(f"model {source.model!r}: not a checkpoint folder, it has no config.json")
    if not folder.exists() and (folder.is_absolute() or source.model.startswith(".")):
        raise StreamlineError(f"model {source.model!r}: no such folder; give a checkpoint's folder or a Hub id")
    try:
        config = _config_of(source)
    except Exception as error:  # a wrong config raises whatever its class makes of it
        raise StreamlineError(f"model {source.model!r}: cannot be read ({_first_line(error)})") from None
    architecture_of(config)
    bare_layers(config)
    return config


def _config_of(source: Source) -> PreTrainedConfig:
    fields, _ = PreTrainedConfig.get_config_dict(source.model, cache_dir=source.cache_dir)
    config: PreTrainedConfig
    if is_bare_checkpoint(fields):
        config = host_config(fields)
    else:
        config = AutoConfig.from_pretrained(source.model, **source.options())
    return config


def load_stock(
    source: Source,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    offload: Path | None = None,
    quantization: Any = None,
) -> PreTrainedModel:
    """Load a checkpoint as stock transformers does, dead sublayers computed with their zeros; bare layers besides.

    Args:
        dtype: What to load in; the checkpoint's own by default, and always of one that is quantized.
        offload: Leave the weights on disk, as `offload_options` does with this folder.
        quantization: transformers' `quantization_config`, to quantize the weights as they are read.

    Raises:
        StreamlineError: a weight is missing, of the wrong shape, truncated or not finite.
    """
    config = read_config(source)
    check_device(device)
    quantized = quantization is not None or quantization_name(config) is not None
    if quantized and offload:
        raise StreamlineError(f"model {source.model!r}: its weights are quantized, and cannot stay on disk")
    options: dict[str, Any] = {"dtype": "auto" if dtype is None or quantized else dtype}
    options |= offload_options(offload) if offload else {}
    if quantized:
        options["device_map"] = {"": device}  # where the numbers are is settled as they are made
    if quantization is not None:
        options["quantization_config"] = quantization
    model, info = _read_model(source, config, options)
    for fault in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if info[fault]:
            names = sorted(str(name) for name in info[fault])
            raise StreamlineError(f"model {source.model!r}: {len(names)} {fault.replace('_', ' ')}, first {names[0]!r}")
    _check_finite(source.model, model)
    if quantized:
        keep_as_read(model)
        save_as_read(model)
    module: nn.Module = model  # transformers' own `to` carries no types
    if not offload and not quantized:
        module.to(device)
    module.eval()
    return model


def check_device(device: str) -> None:
    """Refuse a device that torch cannot compute on here.

    Raises:
        StreamlineError: naming it.
    """
    if device not in ("cpu", "cuda"):
        raise StreamlineError(f"device {device!r}: unknown; one of cpu, cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise StreamlineError("device 'cuda': this machine or this build of torch has none; use 'cpu'")


def _read_model(source: Source, config: PreTrainedConfig, options: dict[str, Any]) -> tuple[PreTrainedModel, Any]:
    """A model, and what transformers says of the weights it found."""
    options |= {"use_safetensors": True, "output_loading_info": True}
    loaded: Any
    try:
        if bare_layers(config):
            loaded = load_bare(source.model, config, cache_dir=source.cache_dir, **options)
        else:
            loaded = AutoModelForCausalLM.from_pretrained(source.model, **options, **source.options())
    except Exception as error:  # safetensors and the Hub client each raise their own
        raise StreamlineError(f"model {source.model!r}: cannot be loaded ({_first_line(error)})") from None
    model, info = loaded
    return model, info


def load(
    path: str, dtype: torch.dtype | None = None, device: str = "cpu", offload: Path | None = None, **options: Any
) -> PreTrainedModel:
    """Load a checkpoint with its dead sublayers dropped: no matrix product, no cache entry.

    The only way to load one that has a bare feed-forward network for a layer, which stock transformers refuses.

    Args:
        path: A checkpoint's folder or Hub id, ours or not.
        dtype: What to load in; the checkpoint's own by default.
        offload: Leave the weights on disk, as `offload_options` does with this folder.
        options: `cache_dir`, `trust_remote_code`.

    Returns:
        A `transformers` model in evaluation mode, with the function that stock transformers computes where it can.

    Raises:
        StreamlineError: the checkpoint cannot be handled, or a weight is missing or not finite.
    """
    model = load_stock(Source(path, **options), dtype, device, offload)
    return drop_dead_sublayers(model, architecture_of(model.config))


def stored_dtype(config: PreTrainedConfig) -> str:
    """The name in `DTYPES` of what a checkpoint's float weights are stored in; `fp32` where its config does not say."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    return names[config.dtype] if isinstance(config.dtype, torch.dtype) and config.dtype in names else "fp32"


def load_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer.

    Raises:
        StreamlineError: it has none.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source.model, **source.options())
    except Exception as error:
        raise StreamlineError(f"model {source.model!r}: no tokenizer ({_first_line(error)})") from None
    return tokenizer


def local_folder(source: Source) -> Path:
    """The folder on this machine that holds the checkpoint's files, fetched from the Hub where they are not yet.

    Raises:
        StreamlineError: they cannot be fetched.
    """
    if Path(source.model).is_dir():
        return Path(source.model)
    try:
        return Path(snapshot_download(source.model, cache_dir=source.cache_dir, allow_patterns=list(HUB_PATTERNS)))
    except Exception as error:  # the Hub client raises its own and its transport's
        raise StreamlineError(f"model {source.model!r}: cannot be fetched ({_first_line(error)})") from None


def fingerprint(path: str, cache_dir: str | None = None) -> str:
    """SHA-256 over a checkpoint's config and weights: two checkpoints with one fingerprint are one model."""
    folder = local_folder(Source(path, cache_dir))
    digest = hashlib.sha256()
    for file in sorted(file for pattern in ("config.json", *WEIGHT_PATTERNS) for file in folder.glob(pattern)):
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def weight_bytes(folder: Path) -> int:
    """Bytes of the weights of a checkpoint on disk."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def save_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype | None, folder: Path
) -> None:
    """Write weights, config, generation config and tokenizer into `folder`.

    Args:
        dtype: What `model` is cast to first, in place; `None` leaves every weight as it is.
    """
    if dtype is not None:
        module: nn.Module = model  # transformers' own `to` carries no types
        module.to(dtype)
        _check_finite(f"stored in {dtype}", model)  # half precision ends at 65504
        model.config.dtype = dtype
    save_weights(model, folder)
    save_tokenizer(tokenizer, folder)


def save_weights(model: PreTrainedModel, folder: Path) -> None:
    """Write weights, config and generation config into `folder`, as they are."""
    save = save_bare if bare_layers(model.config) else PreTrainedModel.save_pretrained
    save(model, folder)
    add_older_names(folder)


def read_record(path: str) -> dict[str, Any] | None:
    """The `streamline.json` of a checkpoint of ours; `None` for any other.

    Raises:
        StreamlineError: there is one, but it is broken.
    """
    file = Path(path) / RECORD_FILE
    if not file.is_file():
        return None
    try:
        record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        missing = [key for key in RECORD_KEYS if key not in record]
    except (ValueError, TypeError):
        missing = list(RECORD_KEYS)
    if missing:
        raise StreamlineError(f"{file}: not a record of this program, it lacks {missing[0]!r}")
    return record


def _check_finite(name: str, model: PreTrainedModel) -> None:
    for key, _ in model.named_parameters():
        if not bool(torch.isfinite(read_parameter(model, key)).all()):
            raise StreamlineError(f"model {name!r}: weight {key} holds NaN or infinite values")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
