"""Reading what was written before it is delivered: does the folder give the model and tokenizer that were in memory?

The checkpoint is loaded as any other program would load it, in the type its weights are stored in, and its logits are
compared with those of the model that was saved. Knows nothing of how the model was made.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .bare_layers import bare_layers
from .checkpoint import load_stock, read_config
from .errors import ParityError, StreamlineError, first_line
from .quantized import keep_as_read
from .source import Source

# Words, code, numbers, spaces, other scripts and a sign beyond the basic plane: where tokenizers are known to differ.
SAMPLE = (
    "The quick brown fox didn't jump over 12,345.67 lazy dogs.\n\n  def f(x):\n\treturn x ** 2  # naïve café, déjà vu\n"
    "Zwölf Boxkämpfer jagen Viktor. Съешь же ещё этих мягких булок. 敏捷的棕色狐狸 🦊 المثال"
)
MARGIN = 4
"""How many times the difference may be that rounding alone was measured to give in the same type."""

_ROWS, _LENGTH = 3, 64


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
        ids: Tokens `[rows, length]`.
        logits: The saved model's, `[rows, length, vocabulary]`, in the type that its weights are stored in.
        noise: The largest difference between these and the same model's when it reads only the first half of the
            tokens, which changes nothing but the order of additions: what rounding gives in that type.
    """

    ids: torch.Tensor
    logits: torch.Tensor
    noise: float

    @property
    def allowed(self) -> float:
        """The largest difference of a logit that is no fault."""
        rounding = torch.finfo(torch.float32).eps * float(self.logits.abs().max())
        return MARGIN * max(self.noise, rounding)


def expected_of(model: PreTrainedModel, ids: torch.Tensor) -> Expected:
    """What the folder of `model`, as it is now, must give.

    Args:
        model: In evaluation mode, its weights as they are saved.
        ids: Text to compare on, `[windows, length]`, of which the beginning is used.

    Raises:
        ParityError: its logits are not finite.
    """
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
    return Expected(ids, logits, float((_logits(model, ids[:, :half]) - logits[:, :half]).abs().max()))


def release(model: nn.Module) -> None:
    """Let go of a model's weights, in place: of no use afterwards, it takes no memory beside the one that is read."""
    for module in model.modules():
        module._parameters.clear()
        module._buffers.clear()
    gc.collect()


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
        if bare_layers_in(folder):
            return load_stock(Source(str(folder)), device=device)
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
    keep_as_read(model)
    for value in model.parameters():
        if type(value) is nn.Parameter and value.device.type == "cpu":
            # Off the file's own bytes: where numbers lie in memory can change how they are added.
            value.data = value.data.clone()
    read: PreTrainedModel = model.eval()
    return read


def bare_layers_in(folder: Path) -> bool:
    """Whether the checkpoint in `folder` is one that stock transformers refuses, having bare layers."""
    return bool(bare_layers(read_config(Source(str(folder)))))


@torch.inference_mode()
def _logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=ids.to(model.device), use_cache=False).logits
    return logits.float().cpu()


def _place(differences: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.unravel_index(differences.argmax(), differences.shape)
