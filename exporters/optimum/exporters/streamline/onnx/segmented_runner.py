"""Running an exported graph a few layers at a time, for a model that is larger than the memory there is.

Every call is answered by one part of the graph before the next part is opened, so each weight is read once. This file
knows the names in `public_names.py` and the hidden states that pass from layer to layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from optimum.exporters.streamline.graph_files import GRAPH_FILE
from optimum.exporters.streamline.parity.calls import Call
from optimum.streamline.runtime.runner import Logits

from .runner import empty_cache_state, open_session, to_ort_value, token_inputs

Values = dict[str, Any]
"""ONNX Runtime's own values by name, for numpy lacks a type that they may have."""


@dataclass(frozen=True)
class _Segment:
    """A part of the graph, by the names of what enters and what leaves it."""

    inputs: list[str]
    outputs: list[str]


class SegmentedRunner:
    """Answers calls to `model.onnx` of an exported folder, a few layers in memory at a time.

    Args:
        folder: The artifact's folder.
        hidden: The names of the hidden states that leave the layers, first to last.
        limit: Bytes of weights to have open at once; a single layer may be more.
        device: `cpu` or `cuda`.
    """

    def __init__(self, folder: Path, hidden: Sequence[str], limit: int, device: str = "cpu") -> None:
        self._folder, self._device = folder, device
        self._model = ir.load(folder / GRAPH_FILE)
        self.segments = list(_segments(self._model.graph, hidden, limit))

    def answer(self, calls: Sequence[Call]) -> list[Logits]:
        """The logits `[batch, length, vocabulary]` of each call."""
        held: list[Values] = [
            {name: to_ort_value(array) for name, array in token_inputs(call.input_ids, call.attention_mask).items()}
            for call in calls
        ]
        for place, segment in enumerate(self.segments):
            self._run(segment, calls, held)
            needed = {"logits"}.union(*(each.inputs for each in self.segments[place + 1 :]))
            held = [{name: value for name, value in values.items() if name in needed} for values in held]
        return [values["logits"].numpy().astype(np.float32, copy=False) for values in held]

    def _run(self, segment: _Segment, calls: Sequence[Call], held: list[Values]) -> None:
        """Answer every call as far as one segment goes, adding to what is held for each."""
        graph = ir.convenience.extract(self._model.graph, segment.inputs, segment.outputs)
        proto = ir.to_proto(ir.Model(graph, ir_version=self._model.ir_version))
        session = open_session(proto.SerializeToString(), self._device, self._folder)
        states = [each for each in session.get_inputs() if each.name.startswith("past_key_values.")]
        for place, call in enumerate(calls):
            past = {} if call.follows is None else held[call.follows]
            for each in states:
                present = each.name.replace("past_key_values", "present")
                held[place][each.name] = (
                    past[present] if past else empty_cache_state(each, len(call.input_ids), self._device)
                )
            feeds = {name: held[place][name] for name in segment.inputs}
            made = session.run_with_ort_values(segment.outputs, feeds)
            held[place].update(zip(segment.outputs, made, strict=True))


def _segments(graph: ir.Graph, hidden: Sequence[str], limit: int) -> Iterator[_Segment]:
    places = _places(graph, hidden, limit)
    for segment in range(max(places.values()) + 1):
        nodes = [node for node, place in places.items() if place == segment]
        read = dict.fromkeys(value for node in nodes for value in node.inputs if value is not None)
        made = [value for node in nodes for value in node.outputs]
        yield _Segment(
            [str(each.name) for each in read if _comes_from_before(each, places, segment)],
            [str(each.name) for each in made if _is_read_later(each, places, segment)],
        )


def _comes_from_before(value: ir.Value, places: dict[ir.Node, int], segment: int) -> bool:
    producer = value.producer()
    return value.is_graph_input() if producer is None else places[producer] < segment


def _is_read_later(value: ir.Value, places: dict[ir.Node, int], segment: int) -> bool:
    return value.is_graph_output() or any(places[use.node] > segment for use in value.uses())


def _places(graph: ir.Graph, hidden: Sequence[str], limit: int) -> dict[ir.Node, int]:
    """The segment of each node: that of its layer, layers being taken together as long as their weights are few."""
    layers = _layers(graph, hidden)
    sizes = [0] * (len(hidden) + 1)
    for node, layer in layers.items():
        sizes[layer] += sum(
            value.const_value.nbytes for value in node.inputs if value is not None and value.const_value
        )
    segments, taken = [0], sizes[0]
    for size in sizes[1:]:
        begins = size > 0 and taken + size > limit  # a layer that is wholly dead has nothing to open
        taken = size if begins else taken + size
        segments.append(segments[-1] + begins)
    return {node: segments[layer] for node, layer in layers.items()}


def _layers(graph: ir.Graph, hidden: Sequence[str]) -> dict[ir.Node, int]:
    """For each node how many hidden states it comes after; what is made of weights alone goes with its first reader."""
    states = {name: place + 1 for place, name in enumerate(hidden)}
    after: dict[ir.Value, int] = dict.fromkeys(graph.inputs, 0)
    layers: dict[ir.Node, int] = {}
    of_weights: list[ir.Node] = []
    for node in graph:
        read = [after[value] for value in node.inputs if value in after]
        if not read:
            of_weights.append(node)
            continue
        layers[node] = max(read)
        for value in node.outputs:
            after[value] = states.get(str(value.name), layers[node])
    for node in reversed(of_weights):
        layers[node] = min((layers[each] for each in node.successors()), default=0)
    return {node: layers[node] for node in graph}
