"""The theoretical cost of a model, from its config alone: parameters, cache, bytes read per token, FLOPs of a prompt.

The ideal speed-ups follow from it. Decoding one sequence is limited by the bytes read for each token, and a long prompt
by arithmetic. The overheads of a runtime are not included.
torch's `FlopCounterMode` counts arithmetic, but not the bytes that a token reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from optimum.streamline.checkpoints.loading import DTYPES
from optimum.streamline.model_files.artifact import is_artifact
from optimum.streamline.model_files.weight_files import find_weights
from optimum.streamline.models.architectures import active_share, architecture_of, head_size, key_value_heads
from optimum.streamline.models.bare_layers import place_bare_layers
from optimum.streamline.models.linear_modules import meta_model
from optimum.streamline.models.quantization_config import float_config
from optimum.streamline.models.skipped_sublayers import ATTENTION, MLP, layers_without_attention, skipped_layers


@dataclass(frozen=True)
class Cost:
    """The theoretical cost of a model.

    Args:
        parameters: The number of weights in the files; shared weights count once.
        live_parameters: The number of weights without the skipped sublayers.
        read_parameters: The number of weights that one token is multiplied by. Embeddings do not count, unless the head
            shares their weight. Of experts, only the active share counts.
        layers: The number of decoder layers.
        windows: For each layer with attention, the size of its sliding window in tokens; `None` for full attention.
        kv_width: The cached numbers per token and attention layer, keys and values together.
        attention_width: The number of heads times the head size.
        element_bytes: The bytes of a number in the dtype of the computation.
        weight_bytes: The bytes of the weights that one token is multiplied by, if they are quantized. By default
            `read_parameters` times `element_bytes`.
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
        """The number of layers with attention."""
        return len(self.windows)

    @property
    def kv_bytes_per_token(self) -> int:
        """The growth of the cache with each token, in bytes, before any sliding window is full."""
        return self.attention_layers * self.kv_width * self.element_bytes

    def decode_bytes(self, context: float) -> float:
        """The bytes of weights and cache read to decode one token after `context` others, at batch size 1."""
        cached = sum(_seen(context, window) for window in self.windows) * self.kv_width * self.element_bytes
        weights = self.read_parameters * self.element_bytes if self.weight_bytes is None else self.weight_bytes
        return weights + cached

    def prefill_flops(self, length: int) -> float:
        """The floating-point operations of a prompt of `length` tokens, with logits for every token, at batch size 1.

        Each weight takes 2 operations per token. Each pair of a token and a token it attends to takes
        4 x `attention_width` operations in each layer: 2 for query times key, and 2 for attention weight times value.
        """
        pairs = sum(sum(_seen(position + 1, window) for position in range(length)) for window in self.windows)
        return 2 * self.read_parameters * length + 4 * self.attention_width * pairs


def cost_of(config: PreTrainedConfig, dtype: str) -> Cost:
    """The cost of a model with this config that computes in `dtype`, a key of `checkpoints.loading.DTYPES`."""
    with torch.device("meta"):
        model = place_bare_layers(meta_model(float_config(config)))
    skipped = _skipped_prefixes(config)
    # `named_parameters` yields a weight that is shared under two names once.
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
    """The bytes, in a checkpoint's files, of the weights that one token is multiplied by. It is for quantized models.

    Args:
        folder: The folder of the checkpoint.
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
    """The bytes on disk of the weights of a checkpoint, of an engine, or of an ONNX graph with its data files."""
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
