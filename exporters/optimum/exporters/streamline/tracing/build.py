"""Build the complete ONNX graph of a model; its weights stay on disk.

The steps, in order: trace a few layers, simplify the graph, copy the traced layers to all layers ("stamp" them), bind
the weights, and set the public names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir
from transformers import PreTrainedModel

from optimum.exporters.streamline.rewriting.attention import append_within_attention, simplify_attention
from optimum.exporters.streamline.rewriting.fix_types import fix_types
from optimum.exporters.streamline.rewriting.mask import simplify_mask
from optimum.exporters.streamline.rewriting.prune_unused import remove_unused
from optimum.exporters.streamline.rewriting.public_names import TOKEN_INPUTS, MaskInput, set_public_names
from optimum.exporters.streamline.rewriting.static_cache import STATIC_INPUTS, use_static_caches
from optimum.streamline.models.architectures import architecture_of
from optimum.streamline.models.skipped_sublayers import cache_indices

from .bind_weights import bind_weights
from .skeleton import skeleton, templates
from .stamp_layers import CannotStampError, LayerMap, first_layer_input, stamp
from .trace import trace


@dataclass(frozen=True)
class BuiltGraph:
    """The complete graph of a model.

    Args:
        model: The graph. Its weights are lazy: they are read when the graph is saved.
        hidden: The output hidden state of each layer, `[batch, length, width]`, first to last; empty if the layers
            are not separable parts of the graph.
        first_layer_input: The hidden state that the first layer reads; `None` if it could not be identified.
        masks: The attention-mask inputs of a graph with static caches; empty for a graph with growing caches.
    """

    model: ir.Model
    hidden: list[ir.Value]
    first_layer_input: ir.Value | None = None
    masks: tuple[MaskInput, ...] = ()

    @property
    def states(self) -> tuple[str, ...]:
        """The names of the hidden states before the first layer and after each; empty if any is unknown."""
        if self.first_layer_input is None or not self.hidden:
            return ()
        return tuple(str(value.name) for value in (self.first_layer_input, *self.hidden))


def build_graph(model: PreTrainedModel, traced: Sequence[int], cache_length: int | None = None) -> BuiltGraph:
    """Build the graph of a model, without its skipped sublayers, and with public input and output names.

    Args:
        model: The model, its weights offloaded to disk.
        traced: The indices of the layers to trace: all layers, or `layers_to_trace(model)`.
        cache_length: The length in tokens of static caches, which the graph writes in place; `None` for caches that
            grow with each call.

    Returns:
        The graph and its hidden states.

    Raises:
        CannotStampError: a traced layer is not a separable part of the graph, so it cannot be copied to the others.
        StreamlineError: the graph cannot be given static caches or public names.
    """
    short = skeleton(model, traced)
    graph = trace(short)
    fix_types(graph)
    remove_unused(graph)
    simplify_mask(graph)
    simplify_attention(graph)
    if cache_length is None:
        append_within_attention(graph)
        masks: tuple[MaskInput, ...] = ()
    else:
        masks = use_static_caches(graph, cache_length)
    path = architecture_of(model.config).layers
    layers = LayerMap(path, traced, templates(model, traced), cache_indices(short), cache_indices(model))
    entry = first_layer_input(graph.graph, layers)
    try:
        hidden = stamp(graph, layers)
    except CannotStampError:
        if len(traced) < model.config.num_hidden_layers:
            raise
        hidden = []  # every layer was traced, so none needs to be copied
    bind_weights(graph, model)
    set_public_names(graph, TOKEN_INPUTS if cache_length is None else STATIC_INPUTS)
    return BuiltGraph(graph, hidden, entry, masks)
