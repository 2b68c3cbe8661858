"""Checkpoints as real users have them, in small: what public reports described, rebuilt in a few lines."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tiny import tiny_model

VOCABULARY = 2048
# English that does not change with the Python that runs the tests.
LICENSE = Path(__file__).parents[1] / "LICENSE"
TEXT = LICENSE.read_text(encoding="utf-8")


def make(folder: Path, architecture: str = "llama", dtype: torch.dtype = torch.float32, **fields: Any) -> Path:
    """A tiny random model with a tokenizer of its own size, saved into `folder`."""
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "vocab_size": VOCABULARY}
    model = tiny_model(architecture, **{**tokens, "num_hidden_layers": 8, **fields}).to(dtype)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer trained on `TEXT`."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<pad>", "<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([TEXT], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def edit_config(folder: Path, name: str = "config.json", **fields: Any) -> None:
    """Set fields of a JSON file; those that are None are taken out."""
    file = folder / name
    old = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps({key: value for key, value in {**old, **fields}.items() if value is not None}))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors of a single-file checkpoint."""
    file = folder / "model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})
