"""A graph that by default gives the logits of each row's last token only, which is all that generating text reads.

The output projection is then computed once a row rather than once a token of the prompt. Edits the finished graph,
after it was compared with torch and quantized, and compares what came of it with what it was; the weights are not
touched.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from optimum.exporters.streamline.graph_files import GRAPH_FILE, LOGITS_TO_KEEP
from optimum.exporters.streamline.rewriting.edits import initializer
from optimum.exporters.streamline.rewriting.public_names import BATCH, LAST_HIDDEN_STATE
from optimum.streamline.errors import ParityError, StreamlineError
from optimum.streamline.runtime.runner import Logits

from .runner import open_session, to_ort_value

if TYPE_CHECKING:
    from onnxruntime import InferenceSession, OrtValue

_TO_THE_END = np.iinfo(np.int64).max

TOLERANCE = 0.1
"""Largest difference of a logit allowed, as a share of the largest.

A quantized projection may scale its input by all tokens of the call, so that which are left out matters; another
token's logits differ by about 1.
"""


def keep_last_logits(folder: Path, width: int, device: str = "cpu") -> None:
    """Give the graph in `folder` the input `num_logits_to_keep`, a scalar, which is 1 where it is not fed.

    As many logits are given, `[batch, num_logits_to_keep, vocabulary]`: those of the last tokens that the attention
    mask does not leave out, whichever side is padded (onnxruntime-genai pads on the right). 0 stands for all.

    Args:
        folder: The artifact's folder.
        width: Numbers in a hidden state, as the output projection takes it.
        device: `cpu` or `cuda`: where the two are compared.

    Raises:
        StreamlineError: the output projection was not found.
        ParityError: what the edited graph gives is not what it gave.
    """
    model = ir.load(folder / GRAPH_FILE)
    graph = model.graph
    states = next((value for node in graph for value in node.outputs if value.name == LAST_HIDDEN_STATE), None)
    if states is None:
        raise StreamlineError("last-logits: the graph's output projection was not found")
    before = _projection(model, [LAST_HIDDEN_STATE])
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
    written = ir.load(folder / GRAPH_FILE)
    after = _projection(written, [LAST_HIDDEN_STATE, "input_ids", "attention_mask", LOGITS_TO_KEEP])
    _compare(open_session(before, device, folder), open_session(after, device, folder), width)


def _projection(model: ir.Model, inputs: list[str]) -> bytes:
    """The part of a graph that makes logits of the last hidden states, and of `inputs` beside them."""
    part = ir.convenience.extract(model.graph, inputs, ["logits"])
    proto: bytes = ir.to_proto(ir.Model(part, ir_version=model.ir_version)).SerializeToString()
    return proto


def _compare(before: InferenceSession, after: InferenceSession, width: int) -> None:
    """Hold the edited projection to the one it was made of, on rows padded on the left, on the right and on neither.

    Raises:
        ParityError: they differ.
    """
    mask = np.array([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [1, 1, 1, 0, 0]])
    last_attended = np.array([4, 4, 2])
    [entering] = before.get_inputs()
    states = {LAST_HIDDEN_STATE: _random_states((*mask.shape, width), entering.type)}
    every = _logits(before, states)
    expected = {0: every, 1: every[np.arange(len(mask)), last_attended][:, None]}
    for kept, right in expected.items():
        feeds = {"input_ids": mask, "attention_mask": mask, LOGITS_TO_KEEP: np.array(kept)}
        found = _logits(after, states | {name: to_ort_value(array) for name, array in feeds.items()})
        difference, allowed = np.abs(found - right).max(), TOLERANCE * np.abs(right).max()
        if not difference <= allowed:  # not `>`: a NaN must fail
            raise ParityError(
                f"last-logits: with {LOGITS_TO_KEEP} {kept} a logit differs from the whole graph's by "
                f"{difference:.3g}, allowed is {allowed:.3g}"
            )


def _logits(session: InferenceSession, feeds: dict[str, OrtValue]) -> Logits:
    [logits] = session.run_with_ort_values(["logits"], feeds)
    return np.asarray(logits.numpy(), np.float32)


def _random_states(shape: tuple[int, ...], kind: str) -> OrtValue:
    from onnxruntime import OrtValue

    values = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    if kind == "tensor(float)":
        return to_ort_value(values)
    if kind == "tensor(float16)":
        return to_ort_value(values.astype(np.float16))
    # numpy lacks bfloat16, which is the upper half of a float32.
    upper = (values.view(np.uint32) >> 16).astype(np.uint16)
    return OrtValue.ortvalue_from_numpy_with_onnx_type(upper, ir.DataType.BFLOAT16.value)


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
