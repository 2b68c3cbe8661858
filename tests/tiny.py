"""Tiny random models, one of every architecture in the table: for shapes and structure, never for quality."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from optimum.streamline.models.architectures import ARCHITECTURES

LAYERS = 5
VOCABULARY = 128

COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 1,
}
ALTERNATING = ["full_attention", "sliding_attention", "full_attention", "sliding_attention", "full_attention"]
# What an architecture needs beside, or instead of, the common fields.
SPECIAL: dict[str, dict[str, Any]] = {
    "exaone4": {"layer_types": ALTERNATING, "sliding_window": 6},
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "layer_types": ALTERNATING, "sliding_window": 6, "query_pre_attn_scalar": 8},
    "gemma3_text": {"head_dim": 8, "layer_types": ALTERNATING, "sliding_window": 6, "query_pre_attn_scalar": 8},
    "glm": {"head_dim": 8},
    "glm4": {"head_dim": 8},
    "gpt2": {"n_embd": 32, "n_layer": LAYERS, "n_head": 4, "n_positions": 64},
    "helium": {"head_dim": 8},
    "ministral3": {"head_dim": 8},
    "mistral": {"sliding_window": None},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "qwen2": {"layer_types": ALTERNATING, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2},
    "qwen3": {"head_dim": 8},
    "qwen3_moe": {
        "head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "mlp_only_layers": [3],
    },
    "seed_oss": {"head_dim": 8},
    "smollm3": {"no_rope_layers": [1, 1, 0, 1, 0]},
}
NOT_COMMON = {
    "gpt2": {
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "max_position_embeddings",
    },
    "opt": {"intermediate_size", "num_key_value_heads"},
    "gpt_neox": {"num_key_value_heads"},
}


# Their modules have the form of others here. `test_architectures.py` tests them in any case.
KIN = {"arcee", "ernie4_5", "exaone4", "glm", "glm4", "helium", "ministral3", "seed_oss"}
NORM_AFTER = {name for name, row in ARCHITECTURES.items() if row.norm_after}
UNMERGEABLE = NORM_AFTER | {name for name, row in ARCHITECTURES.items() if row.experts}


def every(names: Iterable[str] = ARCHITECTURES) -> list[Any]:
    """Architectures as parameters of a test, sorted; those of `KIN` are slow."""
    return [pytest.param(name, marks=pytest.mark.slow if name in KIN else ()) for name in sorted(names)]


def tiny_model(architecture: str = "llama", seed: int = 0, **fields: Any) -> PreTrainedModel:
    """A random model of `LAYERS` layers in fp32, its weights spread enough that every layer matters."""
    common = {key: value for key, value in COMMON.items() if key not in NOT_COMMON.get(architecture, ())}
    config = AutoConfig.for_model(architecture, **{**common, **SPECIAL.get(architecture, {}), **fields})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Biases and norms of a fresh model are zeros and ones: a lost one would not show.
            parameter.add_(torch.randn_like(parameter) * (0.05 if parameter.ndim == 1 else 0.1))
            assert parameter.isfinite().all(), name
    return model


# Widths of whole blocks of 64 numbers, for those that are not as in `COMMON`.
WIDE: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 64},
    "opt": {"hidden_size": 64, "ffn_dim": 128, "word_embed_proj_dim": 64},
}


def wide_model(architecture: str = "llama", seed: int = 0, **fields: Any) -> PreTrainedModel:
    """`tiny_model`, wide enough for quantizers that take weights by blocks of 64."""
    wide = dict(WIDE.get(architecture, {"hidden_size": 64, "intermediate_size": 128}))
    special = SPECIAL.get(architecture, {})
    wide |= {name: value for name, value in (("head_dim", 16), ("moe_intermediate_size", 64)) if name in special}
    return tiny_model(architecture, seed, **{**wide, **fields})


def token_ids(rows: int = 2, length: int = 20, seed: int = 0) -> torch.Tensor:
    """Random token ids `[rows, length]`, special tokens left out."""
    return torch.randint(2, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))
