"""Run an exported graph a few layers at a time, for a model that does not fit in memory.

The graph is cut into segments between layers. One segment is open at a time, and it processes all calls before the next
segment is opened, so each weight is read once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from optimum.exporters.streamline.graph_files import GRAPH_FILE
from optimum.exporters.streamline.parity.model_calls import Call
from optimum.streamline.runtime.runner import Logits

from .runner import empty_cache_state, open_session, to_ort_value, token_inputs

Values = dict[str, Any]
"""`OrtValue`s by name. They are not numpy arrays, because numpy has no bfloat16."""


@dataclass(frozen=True)
class _Segment:
    """A part of the graph: the names of the values that it reads and of those that later parts read."""

    inputs: list[str]
    outputs: list[str]


class SegmentedRunner:
    """Answers calls with the graph of an artifact, with a few layers in memory at a time.

    Args:
        folder: The artifact's folder.
        hidden: The names of the layers' output hidden states, first to last.
        limit: The most bytes of weights in one segment; a segment has at least one layer, even if it is larger.
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
        for index, segment in enumerate(self.segments):
            self._run(segment, calls, held)
            needed = {"logits"}.union(*(each.inputs for each in self.segments[index + 1 :]))
            held = [{name: value for name, value in values.items() if name in needed} for values in held]
        return [values["logits"].numpy().astype(np.float32, copy=False) for values in held]

    def _run(self, segment: _Segment, calls: Sequence[Call], held: list[Values]) -> None:
        """Run one segment for every call, and add its outputs to the values held for the call."""
        graph = ir.convenience.extract(self._model.graph, segment.inputs, segment.outputs)
        proto = ir.to_proto(ir.Model(graph, ir_version=self._model.ir_version))
        session = open_session(proto.SerializeToString(), self._device, self._folder)
        states = [each for each in session.get_inputs() if each.name.startswith("past_key_values.")]
        for call, values in zip(calls, held, strict=True):
            past = {} if call.follows is None else held[call.follows]
            for each in states:
                present = each.name.replace("past_key_values", "present")
                values[each.name] = (
                    past[present] if past else empty_cache_state(each, len(call.input_ids), self._device)
                )
            inputs = {name: values[name] for name in segment.inputs}
            outputs = session.run_with_ort_values(segment.outputs, inputs)
            values.update(zip(segment.outputs, outputs, strict=True))


def _segments(graph: ir.Graph, hidden: Sequence[str], limit: int) -> Iterator[_Segment]:
    segment_of = _segment_by_node(graph, hidden, limit)
    for segment in range(max(segment_of.values()) + 1):
        nodes = [node for node, number in segment_of.items() if number == segment]
        inputs = dict.fromkeys(value for node in nodes for value in node.inputs if value is not None)
        outputs = [value for node in nodes for value in node.outputs]
        yield _Segment(
            [str(each.name) for each in inputs if _comes_from_before(each, segment_of, segment)],
            [str(each.name) for each in outputs if _is_read_later(each, segment_of, segment)],
        )


def _comes_from_before(value: ir.Value, segment_of: dict[ir.Node, int], segment: int) -> bool:
    producer = value.producer()
    return value.is_graph_input() if producer is None else segment_of[producer] < segment


def _is_read_later(value: ir.Value, segment_of: dict[ir.Node, int], segment: int) -> bool:
    return value.is_graph_output() or any(segment_of[use.node] > segment for use in value.uses())


def _segment_by_node(graph: ir.Graph, hidden: Sequence[str], limit: int) -> dict[ir.Node, int]:
    """The number of each node's segment: consecutive layers share one while their weights stay within `limit` bytes."""
    layers = _layers(graph, hidden)
    sizes = [0] * (len(hidden) + 1)
    for node, layer in layers.items():
        sizes[layer] += sum(
            value.const_value.nbytes for value in node.inputs if value is not None and value.const_value
        )
    segments, taken = [0], sizes[0]
    for size in sizes[1:]:
        begins = size > 0 and taken + size > limit  # a layer with both sublayers skipped has no weights
        taken = size if begins else taken + size
        segments.append(segments[-1] + begins)
    return {node: segments[layer] for node, layer in layers.items()}


def _layers(graph: ir.Graph, hidden: Sequence[str]) -> dict[ir.Node, int]:
    """For each node, how many layers are finished before it.

    A node that depends on weights alone is assigned to the first layer that reads it.
    """
    finished_by = {name: index + 1 for index, name in enumerate(hidden)}
    after: dict[ir.Value, int] = dict.fromkeys(graph.inputs, 0)
    layers: dict[ir.Node, int] = {}
    weight_only: list[ir.Node] = []
    for node in graph:
        input_layers = [after[value] for value in node.inputs if value in after]
        if not input_layers:
            weight_only.append(node)
            continue
        layers[node] = max(input_layers)
        for value in node.outputs:
            after[value] = finished_by.get(str(value.name), layers[node])
    for node in reversed(weight_only):
        layers[node] = min((layers[each] for each in node.successors()), default=0)
    return {node: layers[node] for node in graph}
