"""Replace the list of a model's decoder layers, and update every layer count and layer index in its config."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .architectures import PER_LAYER_LISTS, Architecture, architecture_of, submodule
from .quantization_config import renumber_quantization

# Config fields that count how many of the first layers are of one kind.
FIRST_LAYERS_COUNTS = ("max_window_layers", "first_k_dense_replace")
# Config fields that hold a list of layer indices.
LAYER_NUMBERS = ("mlp_only_layers",)


def set_decoder_layers(
    model: PreTrainedModel, architecture: Architecture, layers: Sequence[nn.Module], origins: Sequence[int]
) -> None:
    """Replace the decoder layers of `model`, and update its config, in place.

    Args:
        model: The model.
        architecture: The model's architecture.
        layers: The new layers, first to last.
        origins: For each new layer, the index of the old layer whose per-layer settings, such as the attention type, it
            keeps. Strictly increasing.
    """
    parent_path, _, name = architecture.layers.rpartition(".")
    setattr(submodule(model, parent_path), name, nn.ModuleList(layers))
    for index, layer in enumerate(layers):
        for module in layer.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx = index  # type: ignore[assignment]
    renumber_config(model.config, origins)


def renumber_config(config: PreTrainedConfig, origins: Sequence[int]) -> None:
    """Update every layer count and every per-layer entry of `config` for a new list of layers, in place.

    Args:
        config: The config of the model with the old layers.
        origins: For each new layer, the index of the old layer whose per-layer settings it keeps. Strictly increasing.
    """
    before = config.num_hidden_layers
    renumber_quantization(config, architecture_of(config).layers, origins)
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
    new_entries = {index: per_layer[origin] for index, origin in enumerate(origins) if origin in per_layer}
    if new_entries:
        config.per_layer_config = new_entries  # type: ignore[assignment]
