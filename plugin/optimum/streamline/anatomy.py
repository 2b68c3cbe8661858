"""The inside of models: where the decoder layers are, what writes into the residual stream, what counts layers.

The only file that knows. An architecture is a row of `ARCHITECTURES`, not a class; every row goes through
the conformance suite (`tests/test_conformance.py`). It knows nothing of scores, methods or files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .errors import StreamlineError


@dataclass(frozen=True)
class Architecture:
    """Dotted paths into a causal language model of one architecture.

    Args:
        layers: The list of decoder layers, from the model.
        attention: The attention, from a layer.
        attention_out: The projection that writes attention into the residual stream, from a layer.
    """

    layers: str = "model.layers"
    attention: str = "self_attn"
    attention_out: str = "self_attn.o_proj"


ARCHITECTURES: dict[str, Architecture] = {
    "gemma": Architecture(),
    "gemma2": Architecture(),
    "gpt2": Architecture(layers="transformer.h", attention="attn", attention_out="attn.c_proj"),
    "gpt_neox": Architecture(layers="gpt_neox.layers", attention="attention", attention_out="attention.dense"),
    "granite": Architecture(),
    "llama": Architecture(),
    "mistral": Architecture(),
    "mixtral": Architecture(),
    "olmo2": Architecture(),
    "opt": Architecture(layers="model.decoder.layers", attention_out="self_attn.out_proj"),
    "phi3": Architecture(),
    "qwen2": Architecture(),
    "qwen3": Architecture(),
    "qwen3_moe": Architecture(),
    "smollm3": Architecture(),
    "starcoder2": Architecture(),
}

# Config fields with one entry a layer.
PER_LAYER_LISTS = ("layer_types", "mlp_layer_types", "no_rope_layers")
# Config fields that say how many of the first layers are of a kind.
FIRST_LAYERS_COUNTS = ("max_window_layers", "first_k_dense_replace")
# Config fields that list layer numbers.
LAYER_NUMBERS = ("mlp_only_layers",)
# Config fields that make a layer's function depend on its number, and the only value under which it does not.
POSITION_DEPENDENT = {
    "scale_attn_by_inverse_layer_idx": False,
    "decoder_sparse_step": 1,
    "num_kv_shared_layers": 0,
}


def architecture_of(config: PreTrainedConfig) -> Architecture:
    """The row of `config`'s architecture.

    Raises:
        StreamlineError: it has none, or its layers depend on their numbers.
    """
    if config.model_type not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise StreamlineError(f"architecture {config.model_type!r} cannot be handled; those that can: {known}")
    for field, allowed in POSITION_DEPENDENT.items():
        value = getattr(config, field, allowed)
        if value is not None and value != allowed:
            raise StreamlineError(f"config.{field} is {value!r}: layers depend on their number; it must be {allowed!r}")
    return ARCHITECTURES[config.model_type]


def submodule(module: nn.Module, path: str) -> nn.Module:
    """The submodule at a dotted path."""
    return module.get_submodule(path)


def decoder_layers(model: PreTrainedModel, architecture: Architecture) -> nn.ModuleList:
    """The model's decoder layers, first to last."""
    layers = submodule(model, architecture.layers)
    assert isinstance(layers, nn.ModuleList)
    return layers


def layer_output(output: Any) -> Any:
    """The hidden states `[batch, length, width]` among what a decoder layer returns."""
    return output[0] if isinstance(output, tuple) else output


def set_decoder_layers(
    model: PreTrainedModel, architecture: Architecture, layers: Sequence[nn.Module], origins: Sequence[int]
) -> None:
    """Give `model` these decoder layers, in place, with every count and index in its config kept true.

    Args:
        layers: The new layers, first to last.
        origins: For each, the number of the present layer whose place (kind of attention, ...) it takes; rising.
    """
    parent_path, _, name = architecture.layers.rpartition(".")
    setattr(submodule(model, parent_path), name, nn.ModuleList(layers))
    for index, layer in enumerate(layers):
        for module in layer.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx = index  # type: ignore[assignment]
    renumber_config(model.config, origins)


def renumber_config(config: PreTrainedConfig, origins: Sequence[int]) -> None:
    """Make every count and every per-layer entry of `config` true, in place, for layers that take these places.

    Args:
        origins: As in `set_decoder_layers`.
    """
    before = config.num_hidden_layers
    per_layer = {int(i): entry for i, entry in (config.to_dict().get("per_layer_config") or {}).items()}
    if per_layer:
        config.per_layer_config = None
    for field in PER_LAYER_LISTS:
        values = getattr(config, field, None)
        if isinstance(values, list) and len(values) == before:
            setattr(config, field, [values[origin] for origin in origins])
    for field in FIRST_LAYERS_COUNTS:
        count = getattr(config, field, None)
        if isinstance(count, int):
            setattr(config, field, sum(origin < count for origin in origins))
    for field in LAYER_NUMBERS:
        numbers = getattr(config, field, None)
        if isinstance(numbers, list):
            setattr(config, field, [index for index, origin in enumerate(origins) if origin in numbers])
    config.num_hidden_layers = len(origins)
    kept = {index: per_layer[origin] for index, origin in enumerate(origins) if origin in per_layer}
    if kept:
        config.per_layer_config = kept  # type: ignore[assignment]
