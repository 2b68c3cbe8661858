"""Save a model and its tokenizer as a Hugging Face checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from optimum.streamline.model_files.transformers4_config import add_older_names
from optimum.streamline.model_files.transformers4_tokenizer import save_tokenizer
from optimum.streamline.models.bare_layers import bare_layers, save_bare
from optimum.streamline.models.offloaded_weights import is_offloaded, read_as

from .finite_weights import check_finite_weights

OFFLOADED_SHARD = "1GB"
"""The largest weight file of a model whose weights are on disk: one file at a time is in memory while it is written."""


def save_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype | None, folder: Path
) -> None:
    """Write weights, config, generation config and tokenizer into `folder`.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        dtype: The type to cast the model to first, in place; `None` leaves every weight as it is. Weights on disk are
            cast when they are read.
        folder: The folder to write.

    Raises:
        StreamlineError: a weight is not finite after the cast.
    """
    if dtype is not None:
        if is_offloaded(model):
            read_as(model, dtype)
        else:
            _cast(model, dtype)
        check_finite_weights(f"stored in {dtype}", model)  # the largest fp16 number is 65504
        model.config.dtype = dtype
    save_weights(model, folder)
    save_tokenizer(tokenizer, folder)


def _cast(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Cast the float tensors of a model's state dict, in place.

    Buffers outside the state dict, such as rotary frequencies, stay in fp32: transformers computes them anew in fp32
    when it loads the checkpoint, so a cast would make this model differ from the saved one.
    """
    for value in model.state_dict(keep_vars=True).values():
        if value.is_floating_point():
            value.data = value.data.to(dtype)


def save_weights(model: PreTrainedModel, folder: Path) -> None:
    """Write weights, config and generation config into `folder`, without a cast."""
    save = save_bare if bare_layers(model.config) else PreTrainedModel.save_pretrained
    options: dict[str, Any] = {"max_shard_size": OFFLOADED_SHARD} if is_offloaded(model) else {}
    save(model, folder, **options)
    add_older_names(folder)
