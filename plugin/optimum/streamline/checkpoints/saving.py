"""Writing a Hugging Face checkpoint into a folder."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from optimum.streamline.errors import StreamlineError
from optimum.streamline.models.bare_layers import bare_layers, save_bare
from optimum.streamline.models.offloaded_weights import read_parameter

from .transformers4_config import add_older_names
from .transformers4_tokenizer import save_tokenizer


def save_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype | None, folder: Path
) -> None:
    """Write weights, config, generation config and tokenizer into `folder`.

    Args:
        dtype: What `model` is cast to first, in place; `None` leaves every weight as it is.
    """
    if dtype is not None:
        _cast(model, dtype)
        _check_finite(f"stored in {dtype}", model)  # half precision ends at 65504
        model.config.dtype = dtype
    save_weights(model, folder)
    save_tokenizer(tokenizer, folder)


def _cast(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Give the float numbers that a checkpoint holds another type, in place.

    What it does not hold, such as rotary frequencies, every reader computes anew in fp32: cast, it would be another.
    """
    for value in model.state_dict(keep_vars=True).values():
        if value.is_floating_point():
            value.data = value.data.to(dtype)


def save_weights(model: PreTrainedModel, folder: Path) -> None:
    """Write weights, config and generation config into `folder`, as they are."""
    save = save_bare if bare_layers(model.config) else PreTrainedModel.save_pretrained
    save(model, folder)
    add_older_names(folder)


def _check_finite(name: str, model: PreTrainedModel) -> None:
    for key, _ in model.named_parameters():
        if not bool(torch.isfinite(read_parameter(model, key)).all()):
            raise StreamlineError(f"model {name!r}: weight {key} holds NaN or infinite values")
