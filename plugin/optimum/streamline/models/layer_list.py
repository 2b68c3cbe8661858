"""Replace the list of a model's decoder layers, and update every layer count and layer index in its config."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .architectures import PER_LAYER_LISTS, Architecture, architecture_of, submodule
from .quantization_config import renumber_quantization

# Config fields that count how many of the first layers are of one kind.
FIRST_LAYERS_COUNTS = ("max_window_layers", "first_k_dense_replace")
# Config fields that hold a list of indices of layers whose MLP is of one kind.
LAYER_NUMBERS = ("mlp_only_layers",)
# Per-layer settings that concern the MLP. All others concern the attention.
OF_MLPS = (
    "mlp_layer_types",
    "first_k_dense_replace",
    "intermediate_size",
    "ffn_dim",
    "n_inner",
    "mlp_bias",
    "hidden_act",
    "hidden_activation",
    "activation_function",
    "moe_intermediate_size",
    "num_experts",
    "num_local_experts",
    "num_experts_per_tok",
)


def set_decoder_layers(
    model: PreTrainedModel,
    architecture: Architecture,
    layers: Sequence[nn.Module],
    origins: Sequence[int],
    mlp_origins: Sequence[int] | None = None,
) -> None:
    """Replace the decoder layers of `model`, and update its config, in place.

    Args:
        model: The model.
        architecture: The model's architecture.
        layers: The new layers, first to last.
        origins: For each new layer, the index of the old layer whose per-layer settings, such as the attention type, it
            keeps. Strictly increasing.
        mlp_origins: For each new layer, the index of the old layer that its MLP comes from; by default `origins`.
    """
    parent_path, _, name = architecture.layers.rpartition(".")
    setattr(submodule(model, parent_path), name, nn.ModuleList(layers))
    for index, layer in enumerate(layers):
        for module in layer.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx = index  # type: ignore[assignment]
    renumber_config(model.config, origins, mlp_origins)


def renumber_config(config: PreTrainedConfig, origins: Sequence[int], mlp_origins: Sequence[int] | None = None) -> None:
    """Update every layer count and every per-layer entry of `config` for a new list of layers, in place.

    Args:
        config: The config of the model with the old layers.
        origins: For each new layer, the index of the old layer whose per-layer settings it keeps. Strictly increasing.
        mlp_origins: For each new layer, the index of the old layer that its MLP comes from; by default `origins`.
            Settings of MLPs follow it.
    """
    before = config.num_hidden_layers
    mlp_origins = origins if mlp_origins is None else mlp_origins
    renumber_quantization(config, architecture_of(config), origins, mlp_origins)
    per_layer = {int(i): entry for i, entry in (config.to_dict().get("per_layer_config") or {}).items()}
    if per_layer:
        config.per_layer_config = None
    for field in (*PER_LAYER_LISTS, *FIRST_LAYERS_COUNTS):
        value, followed = getattr(config, field, None), mlp_origins if field in OF_MLPS else origins
        if isinstance(value, list) and len(value) == before:
            setattr(config, field, [value[origin] for origin in followed])
        elif isinstance(value, int):
            setattr(config, field, sum(origin < value for origin in followed))
    for field in LAYER_NUMBERS:
        numbers = getattr(config, field, None)
        if isinstance(numbers, list):
            setattr(config, field, [index for index, origin in enumerate(mlp_origins) if origin in numbers])
    config.num_hidden_layers = len(origins)
    entries = {
        index: {
            **{key: value for key, value in per_layer.get(origin, {}).items() if key not in OF_MLPS},
            **{key: value for key, value in per_layer.get(mlp_origin, {}).items() if key in OF_MLPS},
        }
        for index, (origin, mlp_origin) in enumerate(zip(origins, mlp_origins, strict=True))
    }
    if any(entries.values()):
        config.per_layer_config = {index: entry for index, entry in entries.items() if entry}
