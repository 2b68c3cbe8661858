"""From a model to its whole graph, every weight still on disk: trace, tidy, stamp, bind, name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir
from transformers import PreTrainedModel

from optimum.streamline.anatomy import architecture_of
from optimum.streamline.dead import cache_numbers

from .attention import simplify_attention
from .compact import compact
from .mask import simplify_mask
from .names import rename
from .repair import repair
from .skeleton import skeleton, templates
from .stamp import CannotStampError, Layers, entering, stamp
from .trace import trace
from .weights import bind_weights


@dataclass(frozen=True)
class Built:
    """A graph.

    Args:
        model: The graph, its weights read when they are asked for.
        hidden: The hidden states that leave the layers, first to last; empty where the layers are not parts of it.
        entering: The one that enters the first layer, where it could be told.
    """

    model: ir.Model
    hidden: list[ir.Value]
    entering: ir.Value | None = None

    @property
    def states(self) -> tuple[str, ...]:
        """The names of all of them, first to last; empty where one is not known."""
        if self.entering is None or not self.hidden:
            return ()
        return tuple(str(value.name) for value in (self.entering, *self.hidden))


def build_graph(model: PreTrainedModel, traced: Sequence[int]) -> Built:
    """The one graph of a model, its dead parts left out and its inputs and outputs named for clients.

    Args:
        model: With its weights offloaded.
        traced: The layers to trace: all of them, or `layers_to_trace`.

    Raises:
        CannotStampError: the others cannot be made from these.
    """
    short = skeleton(model, traced)
    graph = trace(short)
    repair(graph)
    compact(graph)
    simplify_mask(graph)
    simplify_attention(graph)
    path = architecture_of(model.config).layers
    layers = Layers(path, traced, templates(model, traced), cache_numbers(short), cache_numbers(model))
    entry = entering(graph.graph, layers)
    try:
        hidden = stamp(graph, layers)
    except CannotStampError:
        if len(traced) < model.config.num_hidden_layers:
            raise
        hidden = []  # none is to be made of another
    bind_weights(graph, model)
    rename(graph)
    return Built(graph, hidden, entry)
