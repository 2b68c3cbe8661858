"""Make the skeleton of a model: a copy with few layers and no weights, which is traced in place of the model.

Tracing takes seconds per layer, and layers of one kind give the same graph. So the skeleton has few layers of each
kind. `trace.py` traces it, and `stamp_layers.py` copies the traced layers to all layers of the model.
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
# Module attributes that do not change a layer's graph: its index, and the mode, which is always evaluation.
_IGNORED_SETTINGS = {"layer_idx", "training"}


def layers_to_trace(model: PreTrainedModel) -> list[int]:
    """The indices of the layers to trace: the first layer, and the first layer of each kind after it.

    The first layer is never copied, because the trace may compute in it what all layers share, such as rotary angles.
    So its kind is traced a second time if it recurs.
    """
    kinds = _kinds(model)
    firsts: dict[Hashable, int] = {}
    for index, kind in list(enumerate(kinds))[1:]:
        firsts.setdefault(kind, index)
    return [0, *sorted(firsts.values())]


def templates(model: PreTrainedModel, traced: Sequence[int]) -> list[int]:
    """For each layer of the model, its template: the position in `traced` of the traced layer that represents it.

    A traced layer represents itself; any other layer is represented by a traced layer of its kind.

    Args:
        model: The model.
        traced: The traced layers: `layers_to_trace(model)`, or all layers.
    """
    kinds = _kinds(model)
    # The first layer is no template for others: the trace may compute in it what all layers share.
    of_kind = {kinds[index]: position for position, index in enumerate(traced) if position}
    own = {index: position for position, index in enumerate(traced)}
    return [own[index] if index in own else of_kind[kind] for index, kind in enumerate(kinds)]


def skeleton(model: PreTrainedModel, layers: Sequence[int]) -> PreTrainedModel:
    """A copy of `model` that has only the given layers, and parameters of the right shape and type but no memory.

    Args:
        model: The model, its weights offloaded to disk.
        layers: The indices of the layers to keep, in rising order.

    Returns:
        A model that can be traced. Each parameter is one zero, expanded to the parameter's shape.
    """
    architecture = architecture_of(model.config)
    short = copy.deepcopy(model)
    module: nn.Module = short
    remove_hook_from_submodules(module)
    kept = decoder_layers(short, architecture)
    set_decoder_layers(short, architecture, [kept[index] for index in layers], layers)
    renumber_cache(short, architecture)
    _replace_parameters(short)
    return short


def _replace_parameters(model: nn.Module) -> None:
    """Replace each parameter by an expanded zero of its shape and type; tied parameters stay tied."""
    # Not on the meta device: the trace combines parameters with real inputs.
    placeholders: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                zero = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
                placeholder = nn.Parameter(zero, requires_grad=False)
                module._parameters[name] = placeholders.setdefault(id(parameter), placeholder)


def _kinds(model: PreTrainedModel) -> list[Hashable]:
    """Each layer's kind: everything that its graph depends on except its index. Equal kinds give equal graphs."""
    layers = decoder_layers(model, architecture_of(model.config))
    config_kinds = layer_kinds(model.config)
    return [(config_kinds[index], _structure(layer)) for index, layer in enumerate(layers)]


def _structure(layer: nn.Module) -> Hashable:
    return tuple((name, type(module), _settings(module), _shapes(module)) for name, module in layer.named_modules())


def _settings(module: nn.Module) -> Hashable:
    plain = {name: value for name, value in vars(module).items() if isinstance(value, _PLAIN)}
    return tuple(sorted((name, repr(value)) for name, value in plain.items() if name not in _IGNORED_SETTINGS))


def _shapes(module: nn.Module) -> Hashable:
    return tuple((name, tuple(each.shape), each.dtype) for name, each in module.named_parameters(recurse=False))
