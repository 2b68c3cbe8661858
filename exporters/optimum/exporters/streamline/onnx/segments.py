"""Cut an exported graph between its layers into segments, which can be run or quantized one after another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import onnx_ir as ir


@dataclass(frozen=True)
class Segment:
    """A part of a graph: one or more whole layers.

    Args:
        inputs: The names of the values that it reads of earlier segments and of the graph's inputs.
        outputs: The names of its values that later segments read, and of those that are outputs of the graph.
    """

    inputs: list[str]
    outputs: list[str]

    def cut_from(self, model: ir.Model) -> ir.Model:
        """This part of `model` as a graph of its own, with copies of the nodes."""
        graph = ir.convenience.extract(model.graph, self.inputs, self.outputs)
        return ir.Model(graph, ir_version=model.ir_version)


def segments_of(graph: ir.Graph, hidden: Sequence[str], limit: int) -> list[Segment]:
    """Cut a graph into segments.

    Args:
        graph: The graph.
        hidden: The names of the layers' output hidden states, first to last.
        limit: The most bytes of weights in one segment; a segment has at least one layer, even if it is larger.
    """
    return list(_segments(graph, hidden, limit))


def _segments(graph: ir.Graph, hidden: Sequence[str], limit: int) -> Iterator[Segment]:
    segment_of = _segment_by_node(graph, hidden, limit)
    for segment in range(max(segment_of.values()) + 1):
        nodes = [node for node, number in segment_of.items() if number == segment]
        inputs = dict.fromkeys(value for node in nodes for value in node.inputs if value is not None)
        outputs = [value for node in nodes for value in node.outputs]
        yield Segment(
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
        # A node that is fused with the next layer's norm gives the norm's output too.
        finished = max(finished_by.get(str(value.name), layers[node]) for value in node.outputs)
        after.update(dict.fromkeys(node.outputs, finished))
    for node in reversed(weight_only):
        layers[node] = min((layers[each] for each in node.successors()), default=0)
    return {node: layers[node] for node in graph}
