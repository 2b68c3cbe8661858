"""Load a saved checkpoint again and check that it is the model that was saved, before the output is delivered.

The folder is loaded as any other program would load it, in its stored dtype. Its tensors, config fields, tokenizer and
logits are compared with those of the model in memory.
"""

from __future__ import annotations

import json
import zlib
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from optimum.streamline.errors import ParityError, StreamlineError, first_line
from optimum.streamline.model_files.source import ModelSource
from optimum.streamline.models.bare_layers import bare_layers
from optimum.streamline.models.offloaded_weights import (
    compute_on,
    device_of,
    is_offloaded,
    offload_options,
    read_parameter,
    read_without_mapping,
)
from optimum.streamline.models.quantized_weights import disable_cpu_kernel, quantized_modules

from .loading import load_stock, read_config

# Words, code, numbers, spaces, other scripts and a character outside the basic plane: tokenizers often differ on these.
SAMPLE = (
    "The quick brown fox didn't jump over 12,345.67 lazy dogs.\n\n  def f(x):\n\treturn x ** 2  # naïve café, déjà vu\n"
    "Zwölf Boxkämpfer jagen Viktor. Съешь же ещё этих мягких булок. 敏捷的棕色狐狸 🦊 المثال"
)
MARGIN = 4
"""The largest allowed logit difference, as a multiple of the difference that rounding alone causes in this dtype."""

_ROWS, _LENGTH = 3, 64
_TOKENIZER_FIELDS = (
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "unk_token_id",
    "chat_template",
    "model_max_length",
)


def read_back(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: torch.Tensor | None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Check that the checkpoint in `folder` holds `model` and `tokenizer`.

    The weights of `model` are released before the folder is loaded, so that two models never take memory at once. The
    model cannot be used afterwards. If its weights are on disk, those of the folder stay there too.

    Args:
        folder: The saved checkpoint.
        model: The model that was saved, with its weights as in the folder.
        tokenizer: The tokenizer that was saved.
        ids: Token ids of evaluation text `[windows, length]`, of which a part is used; `None` for random tokens.
        trust_remote_code: Whether code in the folder may run. Use the same value as for the original.

    Returns:
        Fields for the record: the number of tokens, the largest logit difference, and the largest that is allowed.

    Raises:
        ParityError: the folder cannot be loaded, or holds another model or tokenizer.
    """
    compare_tokenizer(folder, tokenizer, trust_remote_code)
    expected = expected_from(model, random_ids(model.config.vocab_size) if ids is None else ids)
    device, on_disk = str(device_of(model)), is_offloaded(model)
    release_weights(model)
    with TemporaryDirectory() as scratch:
        difference = _compare(folder, expected, device, trust_remote_code, Path(scratch) if on_disk else None)
    return {
        "tokens": expected.ids.numel(),
        "largest_difference": difference,
        "allowed": expected.allowed,
    }


def random_ids(vocabulary: int) -> torch.Tensor:
    """Random token ids for a comparison without text. They are the same in every call.

    Args:
        vocabulary: The number of token ids that the model knows.

    Returns:
        Token ids `[rows, length]`.
    """
    return torch.randint(vocabulary, (_ROWS, _LENGTH), generator=torch.Generator().manual_seed(0))


@dataclass(frozen=True)
class Expected:
    """What a checkpoint must contain and compute, taken from the model in memory before its weights are released.

    Args:
        checksums: Type, shape and checksum of each tensor, by name. Quantized modules are left out.
        config: The fields of its config.
        generation: The fields of its generation config; `None` if it has none.
        ids: Token ids `[rows, length]`.
        logits: The model's logits `[rows, length, vocabulary]`, computed in the stored dtype.
        noise: The largest difference between these logits and those of the first half of the tokens alone. Only the
            order of additions changes, so this is the rounding error in this dtype.
        dtype: The stored dtype.
    """

    checksums: dict[str, tuple[Any, ...]]
    config: dict[str, Any]
    generation: dict[str, Any] | None
    ids: torch.Tensor
    logits: torch.Tensor
    noise: float
    dtype: torch.dtype

    @property
    def allowed(self) -> float:
        """The largest logit difference that counts as rounding: `MARGIN` times the noise, or one step of the dtype."""
        return max(MARGIN * self.noise, torch.finfo(self.dtype).eps * float(self.logits.abs().max()))


def expected_from(model: PreTrainedModel, ids: torch.Tensor) -> Expected:
    """Record what the checkpoint of `model` must contain and compute.

    Args:
        model: The model in evaluation mode, with its weights as saved.
        ids: Token ids `[windows, length]`, of which a part is used.

    Raises:
        ParityError: the logits are not finite.
    """
    checksums = tensor_checksums(model)
    positions = getattr(model.config, "max_position_embeddings", None) or _LENGTH
    ids = ids[:_ROWS, : min(_LENGTH, positions)]
    logits = _logits(model, ids)
    if not bool(logits.isfinite().all()):
        kind = str(model.dtype).removeprefix("torch.")
        raise ParityError(
            f"output: its logits are not finite in {kind}, the dtype it is stored in, because the hidden states "
            "overflow; give dtype 'bf16' or 'fp32'"
        )
    half = max(1, ids.shape[1] // 2)
    noise = float((_logits(model, ids[:, :half]) - logits[:, :half]).abs().max())
    stored = model.dtype if model.dtype.is_floating_point else torch.float32
    generation = model.generation_config.to_dict() if model.generation_config else None
    return Expected(checksums, _fields(model.config), generation, ids, logits, noise, stored)


def release_weights(model: nn.Module) -> None:
    """Free the memory of a model's weights, in place. The model cannot be used afterwards."""
    for module in model.modules():
        module._parameters.clear()
        module._buffers.clear()


def _compare(
    folder: Path,
    expected: Expected,
    device: str = "cpu",
    trust_remote_code: bool = False,
    offload: Path | None = None,
) -> float:
    """Load the checkpoint in `folder` and compare it with what is expected.

    Args:
        folder: The saved checkpoint.
        expected: What it must contain and compute.
        device: The device to compute on, such as `cpu`.
        trust_remote_code: Whether code in the folder may run.
        offload: A folder for `offload_options`. If given, the weights stay on disk.

    Returns:
        The largest absolute logit difference.

    Raises:
        ParityError: the folder cannot be loaded, or its weights, configs or logits differ.
    """
    model = _load(folder, device, trust_remote_code, offload)
    _compare_parts(model, expected)
    logits = _logits(model, expected.ids)
    if not bool(logits.isfinite().all()):
        raise ParityError("output: the saved folder, read back, gives logits that are not finite; nothing is delivered")
    difference = float((logits - expected.logits).abs().max())
    if not difference <= expected.allowed:
        row, position, token = (int(each) for each in _index_of_largest((logits - expected.logits).abs()))
        raise ParityError(
            f"output: the saved folder, read back, computes something else: a logit differs by {difference:.3g}, "
            f"allowed is {expected.allowed:.3g} (row {row}, position {position}, token {token}); nothing is delivered"
        )
    return difference


def _compare_parts(model: PreTrainedModel, expected: Expected) -> None:
    """Compare tensors bit by bit and configs field by field: the logits of a few tokens may hide a difference."""
    checksums = tensor_checksums(model)
    for name, value in expected.checksums.items():
        if checksums.get(name, value) != value:
            raise ParityError(f"output: weight {name}, read back, is not what was saved; nothing is delivered")
    generation = model.generation_config.to_dict() if model.generation_config else {}
    parts = [("config.json", expected.config, _fields(model.config))]
    if expected.generation is not None:
        parts.append(("generation_config.json", expected.generation, generation))
    for file, wanted, got in parts:
        for field, value in wanted.items():
            if field not in _VOLATILE and got.get(field) != value:
                raise ParityError(
                    f"output: {field} in {file}, read back, is {got.get(field)!r} and not {value!r}; "
                    "nothing is delivered"
                )


# Config fields that say how the model was loaded.
_VOLATILE = {"_name_or_path", "transformers_version", "_from_model_config", "_commit_hash"}


def _fields(config: PreTrainedConfig) -> dict[str, Any]:
    """All fields of a config, in their JSON form, without what transformers adds to rotary embeddings as it reads.

    The saved file also has the fields of transformers 4 (`model_files.transformers4_config`). From those it takes
    `type`, another name of `rope_type`.
    """
    fields: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    rope = fields.get("rope_parameters") or {}
    for each in (rope, *rope.values()):  # of all layers, or of each kind of attention
        if isinstance(each, dict) and "rope_type" in each and each.get("type") == each["rope_type"]:
            del each["type"]
    return fields


def tensor_checksums(model: PreTrainedModel) -> dict[str, tuple[Any, ...]]:
    """Type, shape and checksum of each tensor in a model's state dict, by name. Quantized modules are left out."""
    packed = tuple(f"{name}." for name in quantized_modules(model))
    found: dict[str, tuple[Any, ...]] = {}
    for name, value in model.state_dict().items():
        if not name.startswith(packed) and isinstance(value, torch.Tensor):
            read = read_parameter(model, name) if value.is_meta else value
            found[name] = (read.dtype, read.shape, _checksum(read))
    return found


def _checksum(value: torch.Tensor) -> int:
    """CRC-32 of a tensor's bytes."""
    flat = value.detach().cpu().contiguous().reshape(-1)
    return zlib.crc32(flat.view(torch.uint8).numpy().data) if flat.numel() else 0


def compare_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase, trust_remote_code: bool = False) -> None:
    """Load the tokenizer in `folder` and compare it with the one that was saved.

    Args:
        folder: The folder with the saved tokenizer.
        tokenizer: The tokenizer that was saved.
        trust_remote_code: Whether code in the folder may run.

    Raises:
        ParityError: the tokenizer cannot be loaded, or gives other tokens, text or settings.
    """
    try:
        saved: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # tokenizers raises exceptions of its own
        raise ParityError(
            f"output: its tokenizer cannot be read back ({first_line(error)}); nothing is delivered"
        ) from None
    for field in _TOKENIZER_FIELDS:
        wanted, got = (getattr(each, field, None) for each in (tokenizer, saved))
        if wanted != got:
            raise ParityError(
                f"output: {field} of its tokenizer, read back, is {got!r} and not {wanted!r}; nothing is delivered"
            )
    if tokenizer.decode(ids := tokenizer(SAMPLE)["input_ids"]) != saved.decode(ids):
        raise ParityError("output: its tokenizer, read back, decodes tokens to other text; nothing is delivered")
    for text in (SAMPLE, *tokenizer.all_special_tokens):
        wanted, got = tokenizer(text)["input_ids"], saved(text)["input_ids"]
        if wanted != got:
            first = next(
                (n for n, pair in enumerate(zip(wanted, got, strict=False)) if pair[0] != pair[1]), len(wanted)
            )
            raise ParityError(
                f"output: its tokenizer, read back, gives other tokens for {text[:20]!r}: from token {first} on "
                f"{got[first : first + 3]} and not {wanted[first : first + 3]}; nothing is delivered"
            )


def _load(folder: Path, device: str, trust_remote_code: bool, offload: Path | None) -> PreTrainedModel:
    """Load the saved checkpoint in its stored dtype."""
    loaded: Any
    try:
        if _has_bare_layers(folder):  # stock transformers refuses it
            return load_stock(ModelSource(str(folder)), device=torch.device(device).type, offload=offload)
        with read_without_mapping() if offload else nullcontext():
            loaded = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype="auto",
                use_safetensors=True,
                output_loading_info=True,
                trust_remote_code=trust_remote_code,
                **(offload_options(offload) if offload else {"device_map": {"": device}}),
            )
    except StreamlineError as error:
        raise ParityError(f"output: the saved folder cannot be read back ({error}); nothing is delivered") from None
    except Exception as error:  # safetensors and the quantization libraries raise exceptions of their own
        raise ParityError(
            f"output: the saved folder cannot be read back by transformers ({first_line(error)}); nothing is delivered"
        ) from None
    model, info = loaded
    for fault in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if info[fault]:
            names = sorted(str(name) for name in info[fault])
            raise ParityError(
                f"output: the saved folder, read back, has {len(names)} {fault.replace('_', ' ')}, first {names[0]!r}; "
                "nothing is delivered"
            )
    disable_cpu_kernel(model)
    if offload and device != "cpu":
        compute_on(model, device)
    for value in model.parameters():
        if type(value) is nn.Parameter and value.device.type == "cpu":
            # Copy weights out of the memory-mapped file: their alignment in memory can change the order of additions.
            value.data = value.data.clone()
    loaded_model: PreTrainedModel = model.eval()
    return loaded_model


def _has_bare_layers(folder: Path) -> bool:
    """Whether the checkpoint in `folder` has bare layers."""
    return bool(bare_layers(read_config(ModelSource(str(folder)))))


@torch.inference_mode()
def _logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """The logits `[rows, length, vocabulary]` of token ids `[rows, length]`, in fp32 on the CPU."""
    logits: torch.Tensor = model(input_ids=ids.to(device_of(model)), use_cache=False).logits
    return logits.float().cpu()


def _index_of_largest(differences: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The indices `(row, position, token)` of the largest value."""
    return torch.unravel_index(differences.argmax(), differences.shape)
