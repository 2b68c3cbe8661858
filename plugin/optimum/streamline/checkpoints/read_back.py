"""Reading what was written before it is delivered: does the folder give the model and tokenizer that were in memory?

The checkpoint is loaded as any other program would load it, in the type its weights are stored in, and its logits are
compared with those of the model that was saved. Knows nothing of how the model was made.
"""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from optimum.streamline.errors import ParityError, StreamlineError, first_line
from optimum.streamline.models.bare_layers import bare_layers
from optimum.streamline.models.quantized_weights import disable_cpu_kernel, quantized_modules

from .loading import load_stock, read_config
from .source import ModelSource

# Words, code, numbers, spaces, other scripts and a sign beyond the basic plane: where tokenizers are known to differ.
SAMPLE = (
    "The quick brown fox didn't jump over 12,345.67 lazy dogs.\n\n  def f(x):\n\treturn x ** 2  # naïve café, déjà vu\n"
    "Zwölf Boxkämpfer jagen Viktor. Съешь же ещё этих мягких булок. 敏捷的棕色狐狸 🦊 المثال"
)
MARGIN = 4
"""How many times the difference may be that rounding alone was measured to give in the same type."""

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
    """Check that the checkpoint in `folder` is `model` with `tokenizer`; `model` is of no use afterwards.

    Its weights are let go of before the folder is loaded, so that this never takes the memory of two models.

    Args:
        model: What was saved, its weights as they are in the folder.
        ids: Text to compare on, `[windows, length]`, of which the beginning is used; random tokens if there is none.
        trust_remote_code: Whether code that the folder carries may run, as it could when the original was read.

    Returns:
        For the record: the number of tokens, the largest difference of a logit, and the largest that was allowed.

    Raises:
        ParityError: the folder cannot be loaded, or gives another model or tokenizer.
    """
    compare_tokenizer(folder, tokenizer, trust_remote_code)
    expected = expected_of(model, random_ids(model.config.vocab_size) if ids is None else ids)
    device = str(model.device)
    release(model)
    difference = _compare(folder, expected, device, trust_remote_code)
    return {
        "tokens": expected.ids.numel(),
        "largest_difference": difference,
        "allowed": expected.allowed,
    }


def random_ids(vocabulary: int) -> torch.Tensor:
    """Tokens to compare on where there is no text, `[rows, length]`, the same ones each time."""
    return torch.randint(vocabulary, (_ROWS, _LENGTH), generator=torch.Generator().manual_seed(0))


@dataclass(frozen=True)
class Expected:
    """What a folder must give when it is read, found in memory before the model is let go.

    Args:
        sums: Of each tensor that the files hold as it is, its type, shape and checksum.
        config: The fields of its config.
        generation: The fields of its generation config; none where it has none.
        ids: Tokens `[rows, length]`.
        logits: The saved model's, `[rows, length, vocabulary]`, in the type that its weights are stored in.
        noise: The largest difference between these and the same model's when it reads only the first half of the
            tokens, which changes nothing but the order of additions: what rounding gives in that type.
    """

    sums: dict[str, tuple[Any, ...]]
    config: dict[str, Any]
    generation: dict[str, Any] | None
    ids: torch.Tensor
    logits: torch.Tensor
    noise: float
    dtype: torch.dtype

    @property
    def allowed(self) -> float:
        """The largest difference of a logit that is no fault: as measured, or one step of the stored type."""
        return max(MARGIN * self.noise, torch.finfo(self.dtype).eps * float(self.logits.abs().max()))


def expected_of(model: PreTrainedModel, ids: torch.Tensor) -> Expected:
    """What the folder of `model`, as it is now, must give.

    Args:
        model: In evaluation mode, its weights as they are saved.
        ids: Text to compare on, `[windows, length]`, of which the beginning is used.

    Raises:
        ParityError: its logits are not finite.
    """
    sums = _sums(model)
    positions = getattr(model.config, "max_position_embeddings", None) or _LENGTH
    ids = ids[:_ROWS, : min(_LENGTH, positions)]
    logits = _logits(model, ids)
    if not bool(logits.isfinite().all()):
        kind = str(model.dtype).removeprefix("torch.")
        raise ParityError(
            f"output: its logits are not finite when it is computed in {kind}, what it is stored in: the numbers "
            "between its layers are too large for that type; give dtype 'bf16' or 'fp32'"
        )
    half = max(1, ids.shape[1] // 2)
    noise = float((_logits(model, ids[:, :half]) - logits[:, :half]).abs().max())
    kept = model.dtype if model.dtype.is_floating_point else torch.float32
    generation = model.generation_config.to_dict() if model.generation_config else None
    return Expected(sums, _fields(model.config), generation, ids, logits, noise, kept)


def release(model: nn.Module) -> None:
    """Let go of a model's weights, in place: of no use afterwards, it takes no memory beside the one that is read."""
    for module in model.modules():
        module._parameters.clear()
        module._buffers.clear()


def _compare(folder: Path, expected: Expected, device: str = "cpu", trust_remote_code: bool = False) -> float:
    """Load the checkpoint in `folder` and compare what it computes.

    Args:
        trust_remote_code: Whether code that the folder carries may run, as it could when the original was read.

    Returns:
        The largest absolute difference of a logit.

    Raises:
        ParityError: it cannot be loaded, weights are missing or left over, or its logits are others.
    """
    model = _load(folder, device, trust_remote_code)
    _compare_parts(model, expected)
    logits = _logits(model, expected.ids)
    if not bool(logits.isfinite().all()):
        raise ParityError("output: the saved folder, read back, gives logits that are not finite; nothing is delivered")
    difference = float((logits - expected.logits).abs().max())
    if not difference <= expected.allowed:
        row, position, token = (int(each) for each in _place((logits - expected.logits).abs()))
        raise ParityError(
            f"output: the saved folder, read back, computes something else: a logit differs by {difference:.3g}, "
            f"allowed is {expected.allowed:.3g} (row {row}, position {position}, token {token}); nothing is delivered"
        )
    return difference


def _compare_parts(model: PreTrainedModel, expected: Expected) -> None:
    """Compare tensors bit by bit, and both configs field by field, which logits of a few tokens cannot."""
    found = _sums(model)
    for name, value in expected.sums.items():
        if found.get(name, value) != value:
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


# What a config says of how it was read.
_VOLATILE = {"_name_or_path", "transformers_version", "_from_model_config", "_commit_hash"}


def _fields(config: PreTrainedConfig) -> dict[str, Any]:
    fields: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return fields


def _sums(model: PreTrainedModel) -> dict[str, tuple[Any, ...]]:
    """Type, shape and checksum of each tensor of a model, but for those in modules whose weights are quantized."""
    packed = tuple(f"{name}." for name in quantized_modules(model))
    return {
        name: (value.dtype, value.shape, _checksum(value))
        for name, value in model.state_dict().items()
        if not name.startswith(packed) and isinstance(value, torch.Tensor)
    }


def _checksum(value: torch.Tensor) -> int:
    flat = value.detach().cpu().contiguous().reshape(-1)
    return zlib.crc32(flat.view(torch.uint8).numpy().data) if flat.numel() else 0


def compare_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase, trust_remote_code: bool = False) -> None:
    """Load the tokenizer in `folder` and compare what it makes of a text.

    Args:
        tokenizer: The one that was saved.

    Raises:
        ParityError: it cannot be loaded, or gives other tokens.
    """
    try:
        saved: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # tokenizers raises its own
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
        raise ParityError("output: its tokenizer, read back, makes other text of tokens; nothing is delivered")
    for text in (SAMPLE, *tokenizer.all_special_tokens):
        wanted, got = tokenizer(text)["input_ids"], saved(text)["input_ids"]
        if wanted != got:
            place = next(
                (n for n, pair in enumerate(zip(wanted, got, strict=False)) if pair[0] != pair[1]), len(wanted)
            )
            raise ParityError(
                f"output: its tokenizer, read back, gives other tokens for {text[:20]!r}: from place {place} on "
                f"{got[place : place + 3]} and not {wanted[place : place + 3]}; nothing is delivered"
            )


def _load(folder: Path, device: str, trust_remote_code: bool) -> PreTrainedModel:
    loaded: Any
    try:
        if _has_bare_layers(folder):
            return load_stock(ModelSource(str(folder)), device=device)
        loaded = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype="auto",
            use_safetensors=True,
            output_loading_info=True,
            trust_remote_code=trust_remote_code,
            device_map={"": device},
        )
    except StreamlineError as error:
        raise ParityError(f"output: the saved folder cannot be read back ({error}); nothing is delivered") from None
    except Exception as error:  # safetensors and the libraries of quantizers each raise their own
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
    for value in model.parameters():
        if type(value) is nn.Parameter and value.device.type == "cpu":
            # Off the file's own bytes: where numbers lie in memory can change how they are added.
            value.data = value.data.clone()
    read: PreTrainedModel = model.eval()
    return read


def _has_bare_layers(folder: Path) -> bool:
    """Whether the checkpoint in `folder` is one that stock transformers refuses, having bare layers."""
    return bool(bare_layers(read_config(ModelSource(str(folder)))))


@torch.inference_mode()
def _logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=ids.to(model.device), use_cache=False).logits
    return logits.float().cpu()


def _place(differences: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.unravel_index(differences.argmax(), differences.shape)
