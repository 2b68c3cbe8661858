"""What is traced in a model's stead: its structure, as few of its layers as can stand for the rest, no weights.

Tracing takes seconds a layer, and the layers of one kind come out alike. Knows no graph: `trace.py` makes one of the
skeleton, `stamp_layers.py` makes that of the whole model of it.
"""

from __future__ import annotations

import copy
from collections.abc import Hashable, Sequence

import torch
from accelerate.hooks import remove_hook_from_submodules
from torch import nn
from transformers import PreTrainedModel

from optimum.streamline.models.architectures import architecture_of, decoder_layers, layer_kinds
from optimum.streamline.models.layer_list import set_decoder_layers
from optimum.streamline.models.skipped_sublayers import renumber_cache

_PLAIN = (bool, int, float, str, torch.dtype, type(None))
# What numbers a layer without changing what it computes, and what no trace depends on.
_NOT_OF_THE_KIND = {"layer_idx", "training"}


def layers_to_trace(model: PreTrainedModel) -> list[int]:
    """The layers of which a graph of all can be made: the first, one more of its kind, and one of each other kind."""
    kinds = _kinds(model)
    firsts: dict[Hashable, int] = {}
    for index, kind in list(enumerate(kinds))[1:]:
        firsts.setdefault(kind, index)
    return [0, *sorted(firsts.values())]


def templates(model: PreTrainedModel, traced: Sequence[int]) -> list[int]:
    """For each layer, the place among `traced` of the one that stands for it: its own, or that of one of its kind.

    Args:
        traced: `layers_to_trace(model)`.
    """
    kinds = _kinds(model)
    # The first layer is nobody's template: what layers share may have been made in it.
    places = {kinds[index]: place for place, index in enumerate(traced) if place}
    own = {index: place for place, index in enumerate(traced)}
    return [own[index] if index in own else places[kind] for index, kind in enumerate(kinds)]


def skeleton(model: PreTrainedModel, layers: Sequence[int]) -> PreTrainedModel:
    """A copy of `model` with these of its layers, each parameter standing for its shape and type alone.

    Args:
        model: With its weights offloaded.
        layers: Numbers of layers, rising.

    Returns:
        A model that can be traced; its parameters take no memory and hold zeros.
    """
    architecture = architecture_of(model.config)
    short = copy.deepcopy(model)
    module: nn.Module = short
    remove_hook_from_submodules(module)
    kept = decoder_layers(short, architecture)
    set_decoder_layers(short, architecture, [kept[index] for index in layers], layers)
    renumber_cache(short, architecture)
    _stand_in_parameters(short)
    return short


def _stand_in_parameters(model: nn.Module) -> None:
    # Not on the meta device: a trace mixes them with real inputs. One number seen from everywhere in a parameter.
    standing: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                number = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
                module._parameters[name] = standing.setdefault(id(parameter), nn.Parameter(number, requires_grad=False))


def _kinds(model: PreTrainedModel) -> list[Hashable]:
    """What each layer's graph depends on, but for its number: equal for layers of one kind."""
    layers = decoder_layers(model, architecture_of(model.config))
    of_the_config = layer_kinds(model.config)
    return [(of_the_config[index], _structure(layer)) for index, layer in enumerate(layers)]


def _structure(layer: nn.Module) -> Hashable:
    return tuple((name, type(module), _settings(module), _shapes(module)) for name, module in layer.named_modules())


def _settings(module: nn.Module) -> Hashable:
    plain = {name: value for name, value in vars(module).items() if isinstance(value, _PLAIN)}
    return tuple(sorted((name, repr(value)) for name, value in plain.items() if name not in _NOT_OF_THE_KIND))


def _shapes(module: nn.Module) -> Hashable:
    return tuple((name, tuple(each.shape), each.dtype) for name, each in module.named_parameters(recurse=False))
