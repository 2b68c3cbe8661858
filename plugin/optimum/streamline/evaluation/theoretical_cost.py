"""What a model must cost, from its config alone: parameters, cache, bytes read per token, FLOPs of a prompt.

The ideal that a measured speed-up is held against: decoding one sequence is bound by the bytes that each token
has to read, a long prompt by arithmetic. Nothing is loaded, and no runtime's overheads are known here. torch's
`FlopCounterMode` counts the arithmetic of one call, but not the bytes that a token reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from optimum.streamline.checkpoints.artifact import is_artifact
from optimum.streamline.checkpoints.loading import DTYPES
from optimum.streamline.checkpoints.weight_files import find_weights
from optimum.streamline.models.architectures import active_share, architecture_of, head_size, key_value_heads
from optimum.streamline.models.bare_layers import place_bare_layers
from optimum.streamline.models.linear_modules import meta_model
from optimum.streamline.models.quantization_config import float_config
from optimum.streamline.models.skipped_sublayers import ATTENTION, MLP, layers_without_attention, skipped_layers


@dataclass(frozen=True)
class Cost:
    """What a model's form costs.

    Args:
        parameters: All weights in the file, shared ones once.
        live_parameters: Those left when the skipped sublayers are dropped.
        read_parameters: Those that one token multiplies by: no embedding rows, of experts only the active share;
            a head tied to the embeddings counts.
        layers: Decoder layers.
        windows: For each layer that attends, how many tokens back it sees; None is all.
        kv_width: Cached numbers per token and attending layer, keys and values together.
        attention_width: Heads times head size.
        element_bytes: Bytes a number in the dtype it is computed in.
        weight_bytes: Bytes of what one token multiplies by, where that is quantized; by default they follow from
            `read_parameters`.
    """

    parameters: int
    live_parameters: int
    read_parameters: int
    layers: int
    windows: tuple[int | None, ...]
    kv_width: int
    attention_width: int
    element_bytes: int
    weight_bytes: int | None = None

    @property
    def attention_layers(self) -> int:
        """Layers that attend."""
        return len(self.windows)

    @property
    def kv_bytes_per_token(self) -> int:
        """By how much the cache grows with a token, before any window is full."""
        return self.attention_layers * self.kv_width * self.element_bytes

    def decode_bytes(self, context: float) -> float:
        """Bytes read to decode one token after `context` others, batch 1: weights and cache."""
        cached = sum(_seen(context, window) for window in self.windows) * self.kv_width * self.element_bytes
        weights = self.read_parameters * self.element_bytes if self.weight_bytes is None else self.weight_bytes
        return weights + cached

    def prefill_flops(self, length: int) -> float:
        """Floating-point operations of a prompt of `length` tokens whose every token gets logits, batch 1.

        Two for each weight and token; and, for each pair of a token and one it sees, two for each number of
        query times key and two for each of weight times value.
        """
        pairs = sum(sum(_seen(position + 1, window) for position in range(length)) for window in self.windows)
        return 2 * self.read_parameters * length + 4 * self.attention_width * pairs


def cost_of(config: PreTrainedConfig, dtype: str) -> Cost:
    """The cost of a model of this config computed in `dtype`."""
    with torch.device("meta"):
        model = place_bare_layers(meta_model(float_config(config)))
    skipped = _skipped_prefixes(config)
    # Weights shared under two names come once.
    live = [(name, value) for name, value in model.named_parameters() if not name.startswith(skipped)]
    return Cost(
        parameters=model.num_parameters(),
        live_parameters=sum(value.numel() for _, value in live),
        read_parameters=_read_parameters(model, live),
        layers=config.num_hidden_layers,
        windows=_windows(config),
        kv_width=2 * key_value_heads(config) * head_size(config),
        attention_width=config.num_attention_heads * head_size(config),
        element_bytes=DTYPES[dtype].itemsize,
    )


def stored_weight_bytes(folder: Path, config: PreTrainedConfig) -> int:
    """Bytes that the weights one token multiplies by take in a checkpoint's files: what a quantized model reads.

    Args:
        folder: The checkpoint's.
        config: Its config.
    """
    model: Any = meta_model(float_config(config))
    head = model.get_output_embeddings().weight
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)} - {id(head)}
    not_read = {name for name, value in model.named_parameters() if id(value) in embeddings}
    skipped, share = _skipped_prefixes(config), active_share(config)
    read = 0.0
    for tensor in find_weights(folder).tensors():
        if tensor.name not in not_read and not tensor.name.startswith(skipped):
            read += tensor.bytes * (share if ".experts." in tensor.name else 1.0)
    return round(read)


def disk_bytes(folder: Path) -> int:
    """Bytes on disk of a model's weights: a checkpoint's own files, an engine, or an exported graph with its data."""
    engine = folder / "model.engine"
    if engine.is_file():
        return engine.stat().st_size
    if is_artifact(folder):
        return sum(file.stat().st_size for file in folder.glob("model.onnx*"))
    return find_weights(folder).bytes


def _skipped_prefixes(config: PreTrainedConfig) -> tuple[str, ...]:
    architecture = architecture_of(config)
    modules = [(layer, architecture.attention) for layer in skipped_layers(config, ATTENTION)]
    modules += [(layer, name) for layer in skipped_layers(config, MLP) for name in architecture.mlp]
    return tuple(f"{architecture.layers}.{layer}.{name}." for layer, name in modules)


def _read_parameters(model: PreTrainedModel, live: list[tuple[str, nn.Parameter]]) -> int:
    looked_up = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    looked_up.discard(id(model.get_output_embeddings().weight))
    share = active_share(model.config)
    read = 0.0
    for name, value in live:
        if id(value) not in looked_up:
            read += value.numel() * (share if ".experts." in name else 1.0)
    return round(read)


def _windows(config: PreTrainedConfig) -> tuple[int | None, ...]:
    window = getattr(config, "sliding_window", None)
    every = "sliding_attention" if window else "full_attention"
    kinds = getattr(config, "layer_types", None) or [every] * config.num_hidden_layers
    skipped = layers_without_attention(config)
    return tuple(
        window if kind == "sliding_attention" else None for layer, kind in enumerate(kinds) if layer not in skipped
    )


def _seen(context: float, window: int | None) -> float:
    return context if window is None else min(context, window)
