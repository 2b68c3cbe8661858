"""Sublayers that write nothing into the residual stream, and the modules that stand in for them.

In a saved checkpoint a dead sublayer is an ordinary one whose output projection is zero, named in
`config.per_layer_config = {"7": {"skip": ["attention"]}}`: stock transformers computes with the zeros.
Here they are dropped instead: no matrix product, no key or value kept. This file knows neither how a
checkpoint is read nor why a sublayer died.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .anatomy import Architecture, decoder_layers, submodule
from .errors import StreamlineError

ATTENTION = "attention"


class DeadAttention(nn.Module):
    """Stands in for an attention whose output projection is zero: adds nothing, caches nothing.

    It never touches the cache. The live attentions are renumbered (`layer_idx`) so that the cache's first
    entries of each kind are theirs; the entries left over at the end stay uninitialised.
    """

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        """A scalar zero, which the residual addition broadcasts, and no attention weights."""
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        return hidden.new_zeros(()), None


def dead_sublayers(config: PreTrainedConfig) -> dict[int, list[str]]:
    """The dead sublayers `config` names, by layer."""
    per_layer = config.to_dict().get("per_layer_config") or {}
    named = {int(index): list(entry.get("skip", [])) for index, entry in per_layer.items()}
    return {index: skip for index, skip in named.items() if skip}


def mark_dead(config: PreTrainedConfig, dead: dict[int, list[str]]) -> None:
    """Name `dead` in `config`, in the schema transformers has for it, replacing what it named before."""
    per_layer = {int(i): dict(entry) for i, entry in (config.to_dict().get("per_layer_config") or {}).items()}
    for entry in per_layer.values():
        entry.pop("skip", None)
    for index, skip in dead.items():
        per_layer.setdefault(index, {})["skip"] = skip
    per_layer = {index: entry for index, entry in per_layer.items() if entry}
    if per_layer or hasattr(config, "_heterogeneity_spec"):
        config.per_layer_config = per_layer or None  # type: ignore[assignment]


def silence_attention(layer: nn.Module, architecture: Architecture) -> None:
    """Zero a layer's attention output, in place: what `DeadAttention` computes, in the host's own form."""
    projection = submodule(layer, architecture.attention_out)
    with torch.no_grad():
        for parameter in projection.parameters():
            parameter.zero_()


def drop_dead_sublayers(model: PreTrainedModel, architecture: Architecture) -> PreTrainedModel:
    """Replace every dead sublayer of `model` by one that costs nothing, in place; returns `model`.

    Raises:
        StreamlineError: a sublayer named dead is not, or is of a kind that cannot be dropped.
    """
    dead = dead_sublayers(model.config)
    layers = decoder_layers(model, architecture)
    for index, skip in dead.items():
        if skip != [ATTENTION]:
            raise StreamlineError(f"config.json: per_layer_config[{index}].skip is {skip}; known is ['{ATTENTION}']")
        projection = submodule(layers[index], architecture.attention_out)
        if any(bool(parameter.count_nonzero()) for parameter in projection.parameters()):
            raise StreamlineError(
                f"config.json: layer {index} is said to have a dead attention, but its output is not zero"
            )
        setattr(layers[index], architecture.attention, DeadAttention())
    if dead:
        _renumber_cache(model, layers, architecture, set(dead))
    return model


def _renumber_cache(model: PreTrainedModel, layers: nn.ModuleList, architecture: Architecture, dead: set[int]) -> None:
    # The cache is built from the config, one entry a layer, each of its layer's kind; it reads the sequence
    # length off the first entry, so a live layer has to stand there. A dead layer's kind no longer matters: it
    # takes that of a live one, so that no kind is left without.
    live = [index for index in range(len(layers)) if index not in dead]
    if not live:
        raise StreamlineError("every layer has a dead attention: nothing is left to hold the cache")
    kinds = list(getattr(model.config, "layer_types", None) or ["full_attention"] * len(layers))
    kinds = [kinds[live[0] if index in dead else index] for index in range(len(layers))]
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = kinds
    for kind in dict.fromkeys(kinds):
        places = [index for index, other in enumerate(kinds) if other == kind]
        for place, index in zip(places, [index for index in live if kinds[index] == kind], strict=False):
            submodule(layers[index], architecture.attention).layer_idx = place  # type: ignore[assignment]
