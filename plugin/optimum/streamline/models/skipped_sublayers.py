"""Skipped sublayers: attentions and MLPs that add nothing to the residual stream.

In a saved checkpoint, a skipped sublayer is an ordinary one whose output projection is zero, so stock transformers
computes the right result with the zeros. The config names it in the field `per_layer_config`, as in `{"7": {"skip":
["attention"]}}`. In memory, this file replaces it with a module that computes no matrix product and keeps no keys or
values.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from optimum.streamline.errors import StreamlineError

from .architectures import Architecture, Sublayer, architecture_of, decoder_layers, submodule
from .bare_layers import bare_layers
from .offloaded_weights import changing, read_parameter

ATTENTION: Sublayer = "attention"
MLP: Sublayer = "mlp"


class SkippedAttention(nn.Module):
    """Replaces an attention whose output projection is zero. It adds nothing and never uses the cache.

    The other attentions are renumbered with `renumber_cache`, so that the first cache entries belong to them. The
    entries at the end stay uninitialised.
    """

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        """Return a scalar zero, which the residual addition broadcasts, and no attention weights."""
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        return hidden.new_zeros(()), None


class SkippedMLP(nn.Module):
    """Replaces a module of an MLP whose output projection is zero. It adds nothing."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return a scalar zero, which the residual addition broadcasts.

        Args:
            hidden_states: `[batch, length, width]`; only its dtype and device are used.
        """
        return hidden_states.new_zeros(())


def skipped_sublayers(config: PreTrainedConfig) -> dict[int, list[str]]:
    """The skipped sublayers that a config names, by layer index."""
    per_layer = config.to_dict().get("per_layer_config") or {}
    named = {int(index): list(entry.get("skip", [])) for index, entry in per_layer.items()}
    return {index: skip for index, skip in named.items() if skip}


def skipped_layers(config: PreTrainedConfig, sublayer: Sublayer) -> set[int]:
    """The indices of the layers whose attention, or whose MLP, is skipped.

    Args:
        config: The model's config.
        sublayer: `attention` or `mlp`.
    """
    return {layer for layer, skip in skipped_sublayers(config).items() if sublayer in skip}


def skipped_of(config: PreTrainedConfig) -> frozenset[tuple[int, Sublayer]]:
    """The sublayers that a model with this config skips, as (layer, sublayer)."""
    return frozenset((layer, kind) for kind in (ATTENTION, MLP) for layer in skipped_layers(config, kind))


def layers_without_attention(config: PreTrainedConfig) -> set[int]:
    """The indices of the layers that keep no keys and values: a skipped attention, or a bare layer."""
    return skipped_layers(config, ATTENTION) | set(bare_layers(config))


def mark_skipped(config: PreTrainedConfig, skipped: dict[int, list[str]]) -> None:
    """Name skipped sublayers in `config`, in place. Earlier ones are forgotten.

    Args:
        config: The config to change. The names go into transformers' field `per_layer_config`.
        skipped: The skipped sublayers, by layer index.
    """
    per_layer = {int(i): dict(entry) for i, entry in (config.to_dict().get("per_layer_config") or {}).items()}
    for entry in per_layer.values():
        entry.pop("skip", None)
    for index, skip in skipped.items():
        per_layer.setdefault(index, {})["skip"] = skip
    per_layer = {index: entry for index, entry in per_layer.items() if entry}
    if per_layer or hasattr(config, "_heterogeneity_spec"):
        config.per_layer_config = per_layer or None  # type: ignore[assignment]


def zero_output(layer: nn.Module, architecture: Architecture, sublayer: Sublayer) -> None:
    """Set a sublayer's output projection and its bias to zero, in place: the saved form of a skipped sublayer.

    Args:
        layer: The decoder layer.
        architecture: The model's architecture.
        sublayer: `attention` or `mlp`.
    """
    with torch.no_grad():
        for name in _writing_parameters(layer, architecture, sublayer):
            module, _, own = name.rpartition(".")
            with changing(layer.get_submodule(module), [own]):
                layer.get_parameter(name).zero_()


def replace_sublayer(layer: nn.Module, architecture: Architecture, sublayer: Sublayer) -> dict[str, nn.Module]:
    """Replace a sublayer's modules with ones that compute nothing, in place.

    Args:
        layer: The decoder layer.
        architecture: The model's architecture.
        sublayer: `attention` or `mlp`.

    Returns:
        The modules that were replaced, by their name in `layer`.
    """
    names = (architecture.attention,) if sublayer == ATTENTION else architecture.mlp
    replaced = {name: submodule(layer, name) for name in names}
    for name in names:
        setattr(layer, name, SkippedAttention() if sublayer == ATTENTION else SkippedMLP())
    return replaced


def drop_skipped_sublayers(model: PreTrainedModel, architecture: Architecture) -> PreTrainedModel:
    """Replace every skipped sublayer of a model with a module that computes nothing, in place.

    Returns:
        The same model.

    Raises:
        StreamlineError: the output projection of a sublayer that the config calls skipped is not zero; the config names
            an unknown sublayer; or no attention is left.
    """
    layers = decoder_layers(model, architecture)
    for index, skip in skipped_sublayers(model.config).items():
        for name in skip:
            sublayer = _known_sublayer(index, name)
            names = _writing_parameters(layers[index], architecture, sublayer)
            weights = [read_parameter(model, f"{architecture.layers}.{index}.{name}") for name in names]
            if any(bool(weight.count_nonzero()) for weight in weights):
                raise StreamlineError(
                    f"config.json: layer {index} is said to skip its {sublayer}, but its output projection is not zero"
                )
            replace_sublayer(layers[index], architecture, sublayer)
    renumber_cache(model, architecture)
    return model


def renumber_cache(model: PreTrainedModel, architecture: Architecture) -> None:
    """Renumber the cache entries of the attentions, in place, so that layers without attention come last.

    Within each kind of attention, the first entries go to the layers that have one.

    Raises:
        StreamlineError: no layer has an attention.
    """
    # transformers creates the cache from the config: one entry per layer, of that layer's attention type. It reads the
    # sequence length from the first entry, so that entry must belong to a layer with an attention. The type of a layer
    # without attention no longer matters. It gets the type of a layer that has one, so that no type is left without an
    # attention.
    skipped = layers_without_attention(model.config)
    if not skipped:
        return
    layers = decoder_layers(model, architecture)
    live = [index for index in range(len(layers)) if index not in skipped]
    if not live:
        raise StreamlineError("no layer has an attention that is not skipped, and the cache needs one")
    kinds = list(getattr(model.config, "layer_types", None) or ["full_attention"] * len(layers))
    kinds = [kinds[live[0] if index in skipped else index] for index in range(len(layers))]
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = kinds
    for kind in dict.fromkeys(kinds):
        new_layers = [index for index, other in enumerate(kinds) if other == kind]
        for entry, index in zip(new_layers, [index for index in live if kinds[index] == kind], strict=False):
            submodule(layers[index], architecture.attention).layer_idx = entry  # type: ignore[assignment]


def cache_indices(model: PreTrainedModel) -> list[int | None]:
    """The index of each layer's cache entry; `None` for a layer without attention."""
    architecture = architecture_of(model.config)
    attentions = [getattr(layer, architecture.attention, None) for layer in decoder_layers(model, architecture)]
    return [getattr(attention, "layer_idx", None) for attention in attentions]


@contextmanager
def skipped_sublayers_dropped(model: PreTrainedModel) -> Iterator[None]:
    """Replace the skipped sublayers of a model inside the `with` block, and restore them after it."""
    architecture = architecture_of(model.config)
    modules = list(decoder_layers(model, architecture).modules())
    children = [(module, name, child) for module in modules for name, child in module.named_children()]
    numbers = [(module, module.layer_idx) for module in modules if hasattr(module, "layer_idx")]
    kinds = getattr(model.config, "layer_types", None)
    try:
        drop_skipped_sublayers(model, architecture)
        yield
    finally:
        for module, name, child in children:
            setattr(module, name, child)
        for module, number in numbers:
            module.layer_idx = number
        if kinds is not None:
            model.config.layer_types = kinds


def _known_sublayer(index: int, name: str) -> Sublayer:
    """Check the name of a skipped sublayer from a config."""
    for known in (ATTENTION, MLP):
        if name == known:
            return known
    raise StreamlineError(
        f"config.json: per_layer_config[{index}].skip names {name!r}; known are {ATTENTION} and {MLP}"
    )


def _writing_parameters(layer: nn.Module, architecture: Architecture, sublayer: Sublayer) -> list[str]:
    """The parameters in `layer` of a sublayer's output projection. If all are zero, the sublayer's output is zero."""
    paths = (architecture.attention_out,) if sublayer == ATTENTION else architecture.mlp_out
    return [
        name
        for name, _ in layer.named_parameters()
        if any(name == path or name.startswith(f"{path}.") for path in paths)
    ]
