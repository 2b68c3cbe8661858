"""A graph that by default gives the logits of each row's last token only, which is all that generating text reads.

The output projection is then computed once a row rather than once a token of the prompt. Edits the finished graph,
after it was compared with torch and quantized; the weights are not touched.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir

from optimum.streamline.errors import StreamlineError

from .names import BATCH, LAST_HIDDEN_STATE
from .ort_runner import GRAPH_FILE, LOGITS_TO_KEEP
from .rewriting import initializer

_TO_THE_END = np.iinfo(np.int64).max


def keep_last_logits(folder: Path) -> None:
    """Give the graph in `folder` the input `num_logits_to_keep`, a scalar, which is 1 where it is not fed.

    As many logits are given, `[batch, num_logits_to_keep, vocabulary]`: those of the last tokens that the attention
    mask does not leave out, whichever side is padded (onnxruntime-genai pads on the right). 0 stands for all.

    Raises:
        StreamlineError: the output projection was not found.
    """
    model = ir.load(folder / GRAPH_FILE)
    graph = model.graph
    states = next((value for node in graph for value in node.outputs if value.name == LAST_HIDDEN_STATE), None)
    if states is None:
        raise StreamlineError("last-logits: the graph's output projection was not found")
    readers = list(states.uses())
    steps = _Steps(graph)
    kept = steps.add("GatherND", states, _places(graph, steps), batch_dims=1)
    for node, place in readers:
        node.replace_input_with(place, kept)
    graph.extend(steps.nodes)
    graph.sort()
    [logits] = [value for value in graph.outputs if value.name == "logits"]
    assert logits.shape is not None
    logits.shape = ir.Shape([BATCH, 1, logits.shape[2]])  # 1 is what tells GenAI not to look for the last one itself
    ir.save(model, folder / GRAPH_FILE)


class _Steps:
    """Nodes that are to be added to a graph, named by what they are for."""

    def __init__(self, graph: ir.Graph) -> None:
        self.nodes: list[ir.Node] = []
        self._graph = graph

    def add(self, operator: str, *inputs: ir.Value | None, **options: int) -> ir.Value:
        """One more, and what it computes."""
        node = ir.node(operator, inputs, options, name=f"last_logits/{operator}_{len(self.nodes)}")
        node.outputs[0].name = str(node.name)
        self.nodes.append(node)
        return node.outputs[0]

    def constant(self, value: int | list[int]) -> ir.Value:
        """A whole number, or several."""
        return initializer(self._graph, ir.tensor(np.array(value, np.int64), name=f"last_logits/{value}"))


def _places(graph: ir.Graph, steps: _Steps) -> ir.Value:
    """Where in the tokens of this call those are whose logits are kept, `[batch, kept, 1]`."""
    inputs = {str(value.name): value for value in graph.inputs}
    asked = initializer(graph, ir.tensor(np.array(1, np.int64), name=LOGITS_TO_KEEP))
    graph.inputs.append(asked)
    zero, one, second, end = (steps.constant(value) for value in (0, 1, [1], [_TO_THE_END]))
    length = steps.add("Squeeze", steps.add("Shape", inputs["input_ids"], start=1, end=2))
    beginning = steps.add("Unsqueeze", steps.add("Neg", length), steps.constant([0]))
    attended = steps.add("Slice", inputs["attention_mask"], beginning, end, second)
    counted = steps.add("Mul", attended, steps.add("Range", zero, length, one))
    last_attended = steps.add("ReduceMax", counted, second, keepdims=1)
    every = steps.add("Equal", asked, zero)
    count = steps.add("Where", every, length, asked)
    last = steps.add("Where", every, steps.add("Sub", length, one), last_attended)
    first = steps.add("Add", steps.add("Sub", last, count), one)
    places = steps.add("Add", first, steps.add("Range", zero, count, one))
    return steps.add("Unsqueeze", steps.add("Max", places, zero), steps.constant([2]))
