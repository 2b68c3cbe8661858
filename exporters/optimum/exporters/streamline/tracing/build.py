"""From a model to its whole graph, every weight still on disk: trace, tidy, stamp, bind, name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir
from transformers import PreTrainedModel

from optimum.exporters.streamline.rewriting.attention import append_within_attention, simplify_attention
from optimum.exporters.streamline.rewriting.mask import simplify_mask
from optimum.exporters.streamline.rewriting.prune_unused import compact
from optimum.exporters.streamline.rewriting.public_names import TOKEN_INPUTS, MaskInput, rename
from optimum.exporters.streamline.rewriting.repair import repair
from optimum.exporters.streamline.rewriting.static_cache import STATIC_INPUTS, use_static_caches
from optimum.streamline.models.architectures import architecture_of
from optimum.streamline.models.skipped_sublayers import cache_indices

from .bind_weights import bind_weights
from .skeleton import skeleton, templates
from .stamp_layers import CannotStampError, Layers, entering, stamp
from .trace import trace


@dataclass(frozen=True)
class Built:
    """A graph.

    Args:
        model: The graph, its weights read when they are asked for.
        hidden: The hidden states that leave the layers, first to last; empty where the layers are not parts of it.
        entering: The one that enters the first layer, where it could be told.
        masks: The inputs that are masks, of a graph whose caches have a fixed length.
    """

    model: ir.Model
    hidden: list[ir.Value]
    entering: ir.Value | None = None
    masks: tuple[MaskInput, ...] = ()

    @property
    def states(self) -> tuple[str, ...]:
        """The names of all of them, first to last; empty where one is not known."""
        if self.entering is None or not self.hidden:
            return ()
        return tuple(str(value.name) for value in (self.entering, *self.hidden))


def build_graph(model: PreTrainedModel, traced: Sequence[int], cache_length: int | None = None) -> Built:
    """The one graph of a model, its dead parts left out and its inputs and outputs named for clients.

    Args:
        model: With its weights offloaded.
        traced: The layers to trace: all of them, or `layers_to_trace`.
        cache_length: How many places a cache has that is written in place; `None` where it grows, token by token.

    Raises:
        CannotStampError: the others cannot be made from these.
        StreamlineError: its caches cannot have a fixed length.
    """
    short = skeleton(model, traced)
    graph = trace(short)
    repair(graph)
    compact(graph)
    simplify_mask(graph)
    simplify_attention(graph)
    if cache_length is None:
        append_within_attention(graph)
        masks: tuple[MaskInput, ...] = ()
    else:
        masks = use_static_caches(graph, cache_length)
    path = architecture_of(model.config).layers
    layers = Layers(path, traced, templates(model, traced), cache_indices(short), cache_indices(model))
    entry = entering(graph.graph, layers)
    try:
        hidden = stamp(graph, layers)
    except CannotStampError:
        if len(traced) < model.config.num_hidden_layers:
            raise
        hidden = []  # none is to be made of another
    bind_weights(graph, model)
    rename(graph, TOKEN_INPUTS if cache_length is None else STATIC_INPUTS)
    return Built(graph, hidden, entry, masks)
