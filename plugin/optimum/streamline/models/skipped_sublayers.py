"""Sublayers that write nothing into the residual stream, and the modules that stand in for them.

In a saved checkpoint a skipped sublayer is an ordinary one whose output projection is zero, named in
`config.per_layer_config = {"7": {"skip": ["attention"]}}`: stock transformers computes with the zeros.
Here they are dropped instead: no matrix product, no key or value kept. This file knows neither how a
checkpoint is read nor why a sublayer died.
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
from .offloaded_weights import read_parameter

ATTENTION: Sublayer = "attention"
MLP: Sublayer = "mlp"


class SkippedAttention(nn.Module):
    """Stands in for an attention whose output projection is zero: adds nothing, caches nothing.

    It never touches the cache. The live attentions are renumbered (`layer_idx`) so that the cache's first
    entries of each kind are theirs; the entries left over at the end stay uninitialised.
    """

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        """A scalar zero, which the residual addition broadcasts, and no attention weights."""
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        return hidden.new_zeros(()), None


class SkippedMLP(nn.Module):
    """Stands in for a module of an MLP whose output projection is zero: adds nothing."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """A scalar zero, which the residual addition broadcasts."""
        return hidden_states.new_zeros(())


def skipped_sublayers(config: PreTrainedConfig) -> dict[int, list[str]]:
    """The skipped sublayers `config` names, by layer."""
    per_layer = config.to_dict().get("per_layer_config") or {}
    named = {int(index): list(entry.get("skip", [])) for index, entry in per_layer.items()}
    return {index: skip for index, skip in named.items() if skip}


def skipped_layers(config: PreTrainedConfig, sublayer: Sublayer) -> set[int]:
    """The layers whose `sublayer` is dead."""
    return {layer for layer, skip in skipped_sublayers(config).items() if sublayer in skip}


def layers_without_attention(config: PreTrainedConfig) -> set[int]:
    """The layers that keep no keys and values: those whose attention is dead, and those that never had one."""
    return skipped_layers(config, ATTENTION) | set(bare_layers(config))


def mark_skipped(config: PreTrainedConfig, skipped: dict[int, list[str]]) -> None:
    """Name `dead` in `config`, in the schema transformers has for it, replacing what it named before."""
    per_layer = {int(i): dict(entry) for i, entry in (config.to_dict().get("per_layer_config") or {}).items()}
    for entry in per_layer.values():
        entry.pop("skip", None)
    for index, skip in skipped.items():
        per_layer.setdefault(index, {})["skip"] = skip
    per_layer = {index: entry for index, entry in per_layer.items() if entry}
    if per_layer or hasattr(config, "_heterogeneity_spec"):
        config.per_layer_config = per_layer or None  # type: ignore[assignment]


def zero_output(layer: nn.Module, architecture: Architecture, sublayer: Sublayer) -> None:
    """Zero what a sublayer writes, in place: what its stand-in computes, in the host's own form."""
    with torch.no_grad():
        for name in _writing_parameters(layer, architecture, sublayer):
            layer.get_parameter(name).zero_()


def drop(layer: nn.Module, architecture: Architecture, sublayer: Sublayer) -> dict[str, nn.Module]:
    """Put stand-ins that cost nothing in a sublayer's place; returns what stood there, by its name in `layer`."""
    names = (architecture.attention,) if sublayer == ATTENTION else architecture.mlp
    taken = {name: submodule(layer, name) for name in names}
    for name in names:
        setattr(layer, name, SkippedAttention() if sublayer == ATTENTION else SkippedMLP())
    return taken


def drop_skipped_sublayers(model: PreTrainedModel, architecture: Architecture) -> PreTrainedModel:
    """Replace every skipped sublayer of `model` by one that costs nothing, in place; returns `model`.

    Raises:
        StreamlineError: a sublayer named dead is not, or is of a kind that cannot be dropped.
    """
    layers = decoder_layers(model, architecture)
    for index, skip in skipped_sublayers(model.config).items():
        for name in skip:
            sublayer = _known_sublayer(index, name)
            names = _writing_parameters(layers[index], architecture, sublayer)
            written = [read_parameter(model, f"{architecture.layers}.{index}.{name}") for name in names]
            if any(bool(weights.count_nonzero()) for weights in written):
                raise StreamlineError(
                    f"config.json: layer {index} is said to have a dead {sublayer}, but its output is not zero"
                )
            drop(layers[index], architecture, sublayer)
    number_cache(model, architecture)
    return model


def number_cache(model: PreTrainedModel, architecture: Architecture) -> None:
    """Number the cache entries so that the first of each kind are those of layers with an attention, in place.

    Raises:
        StreamlineError: no layer has one.
    """
    # The cache is built from the config, one entry a layer, each of its layer's kind; it reads the sequence
    # length off the first entry, so a live layer has to stand there. A dead layer's kind no longer matters: it
    # takes that of a live one, so that no kind is left without.
    skipped = layers_without_attention(model.config)
    if not skipped:
        return
    layers = decoder_layers(model, architecture)
    live = [index for index in range(len(layers)) if index not in skipped]
    if not live:
        raise StreamlineError("no layer has a live attention: nothing is left to hold the cache")
    kinds = list(getattr(model.config, "layer_types", None) or ["full_attention"] * len(layers))
    kinds = [kinds[live[0] if index in skipped else index] for index in range(len(layers))]
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = kinds
    for kind in dict.fromkeys(kinds):
        new_layers = [index for index, other in enumerate(kinds) if other == kind]
        for place, index in zip(new_layers, [index for index in live if kinds[index] == kind], strict=False):
            submodule(layers[index], architecture.attention).layer_idx = place  # type: ignore[assignment]


def cache_numbers(model: PreTrainedModel) -> list[int | None]:
    """For each layer the number of its cache entry; none for one without an attention."""
    architecture = architecture_of(model.config)
    attentions = [getattr(layer, architecture.attention, None) for layer in decoder_layers(model, architecture)]
    return [getattr(attention, "layer_idx", None) for attention in attentions]


@contextmanager
def skipped_sublayers_dropped(model: PreTrainedModel) -> Iterator[None]:
    """Drop the skipped sublayers inside the block, and put them back after it."""
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
    for known in (ATTENTION, MLP):
        if name == known:
            return known
    raise StreamlineError(
        f"config.json: per_layer_config[{index}].skip names {name!r}; known are {ATTENTION} and {MLP}"
    )


def _writing_parameters(layer: nn.Module, architecture: Architecture, sublayer: Sublayer) -> list[str]:
    """The names of all that a sublayer's output is a product of, or a sum with: zero there is zero out."""
    paths = (architecture.attention_out,) if sublayer == ATTENTION else architecture.mlp_out
    return [
        name
        for name, _ in layer.named_parameters()
        if any(name == path or name.startswith(f"{path}.") for path in paths)
    ]
