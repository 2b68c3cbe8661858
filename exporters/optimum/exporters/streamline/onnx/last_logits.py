"""Change a graph to return only the logits of the last token of each row, which is all that text generation reads.

The output projection then runs once per row, and not once per token of the prompt. The graph is changed after it was
compared with torch and quantized. The changed output projection is compared with the one before. Weights are unchanged.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from optimum.exporters.streamline.graph_files import GRAPH_FILE, LOGITS_TO_KEEP
from optimum.exporters.streamline.rewriting.graph_helpers import initializer
from optimum.exporters.streamline.rewriting.public_names import BATCH, LAST_HIDDEN_STATE
from optimum.streamline.errors import ParityError, StreamlineError
from optimum.streamline.runtime.runner import Logits

from .runner import open_session, to_ort_value

if TYPE_CHECKING:
    from onnxruntime import InferenceSession, OrtValue

_TO_THE_END = np.iinfo(np.int64).max

TOLERANCE = 0.1
"""The largest difference of a logit that is allowed, as a share of the largest logit.

It is not 0, because a quantized projection may scale its input by all tokens of the call, and now there are fewer. The
logits of a wrong token differ by about 1.
"""


def keep_last_logits(folder: Path, width: int, device: str = "cpu") -> None:
    """Give the graph in `folder` the optional input `num_logits_to_keep`, a scalar with the default 1.

    The graph then returns `[batch, num_logits_to_keep, vocabulary]`: the logits of the last tokens that the attention
    mask keeps, whichever side is padded (onnxruntime-genai pads on the right). With 0 it returns the logits of all
    tokens.

    Args:
        folder: The artifact's folder; its `model.onnx` is overwritten.
        width: The size of a hidden state, as the output projection reads it.
        device: `cpu` or `cuda`: where the output projection is compared with the one before.

    Raises:
        StreamlineError: the output projection was not found.
        ParityError: the changed graph gives other logits.
    """
    model = ir.load(folder / GRAPH_FILE)
    graph = model.graph
    states = next((value for node in graph for value in node.outputs if value.name == LAST_HIDDEN_STATE), None)
    if states is None:
        raise StreamlineError("last-logits: the graph's output projection was not found")
    before = _projection(model, [LAST_HIDDEN_STATE])
    readers = list(states.uses())
    builder = _NodeBuilder(graph)
    kept = builder.add("GatherND", states, _kept_positions(graph, builder), batch_dims=1)
    for node, input_index in readers:
        node.replace_input_with(input_index, kept)
    graph.extend(builder.nodes)
    graph.sort()
    [logits] = [value for value in graph.outputs if value.name == "logits"]
    assert logits.shape is not None
    logits.shape = ir.Shape([BATCH, 1, logits.shape[2]])  # with a size of 1, GenAI does not search for the last token
    ir.save(model, folder / GRAPH_FILE)
    written = ir.load(folder / GRAPH_FILE)
    after = _projection(written, [LAST_HIDDEN_STATE, "input_ids", "attention_mask", LOGITS_TO_KEEP])
    _compare(open_session(before, device, folder), open_session(after, device, folder), width)


def _projection(model: ir.Model, inputs: list[str]) -> bytes:
    """The serialized part of a graph from the values `inputs` to the logits: the output projection."""
    part = ir.convenience.extract(model.graph, inputs, ["logits"])
    proto: bytes = ir.to_proto(ir.Model(part, ir_version=model.ir_version)).SerializeToString()
    return proto


def _compare(before: InferenceSession, after: InferenceSession, width: int) -> None:
    """Compare the changed output projection with the one before, on three rows: no padding, left and right padding.

    Raises:
        ParityError: their logits differ.
    """
    mask = np.array([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [1, 1, 1, 0, 0]])
    last_attended = np.array([4, 4, 2])
    [hidden_input] = before.get_inputs()
    states = {LAST_HIDDEN_STATE: _random_states((*mask.shape, width), hidden_input.type)}
    all_logits = _logits(before, states)
    expected_by_setting = {0: all_logits, 1: all_logits[np.arange(len(mask)), last_attended][:, None]}
    for kept, expected in expected_by_setting.items():
        arrays = {"input_ids": mask, "attention_mask": mask, LOGITS_TO_KEEP: np.array(kept)}
        got = _logits(after, states | {name: to_ort_value(array) for name, array in arrays.items()})
        difference, allowed = np.abs(got - expected).max(), TOLERANCE * np.abs(expected).max()
        if not difference <= allowed:  # not `>`, because a NaN must fail
            raise ParityError(
                f"last-logits: with {LOGITS_TO_KEEP} {kept} a logit differs from the whole graph's by "
                f"{difference:.3g}, allowed is {allowed:.3g}"
            )


def _logits(session: InferenceSession, inputs: dict[str, OrtValue]) -> Logits:
    [logits] = session.run_with_ort_values(["logits"], inputs)
    return np.asarray(logits.numpy(), np.float32)


def _random_states(shape: tuple[int, ...], element_type: str) -> OrtValue:
    """Random hidden states of a shape and of an element type, by ONNX Runtime's name of it."""
    from onnxruntime import OrtValue

    values = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    if element_type == "tensor(float)":
        return to_ort_value(values)
    if element_type == "tensor(float16)":
        return to_ort_value(values.astype(np.float16))
    # numpy has no bfloat16; it is the upper half of a float32.
    upper = (values.view(np.uint32) >> 16).astype(np.uint16)
    return OrtValue.ortvalue_from_numpy_with_onnx_type(upper, ir.DataType.BFLOAT16.value)


class _NodeBuilder:
    """Collects the nodes to add to a graph; the name of each begins with `last_logits/`."""

    def __init__(self, graph: ir.Graph) -> None:
        self.nodes: list[ir.Node] = []
        self._graph = graph

    def add(self, operator: str, *inputs: ir.Value | None, **options: int) -> ir.Value:
        """Add a node; returns its output."""
        node = ir.node(operator, inputs, options, name=f"last_logits/{operator}_{len(self.nodes)}")
        node.outputs[0].name = str(node.name)
        self.nodes.append(node)
        return node.outputs[0]

    def constant(self, value: int | list[int]) -> ir.Value:
        """An initializer with an integer or a list of integers."""
        return initializer(self._graph, ir.tensor(np.array(value, np.int64), name=f"last_logits/{value}"))


def _kept_positions(graph: ir.Graph, builder: _NodeBuilder) -> ir.Value:
    """The positions, among the call's tokens, of the tokens whose logits are kept, `[batch, kept, 1]`."""
    inputs = {str(value.name): value for value in graph.inputs}
    to_keep = initializer(graph, ir.tensor(np.array(1, np.int64), name=LOGITS_TO_KEEP))
    graph.inputs.append(to_keep)
    zero, one, second, end = (builder.constant(value) for value in (0, 1, [1], [_TO_THE_END]))
    length = builder.add("Squeeze", builder.add("Shape", inputs["input_ids"], start=1, end=2))
    beginning = builder.add("Unsqueeze", builder.add("Neg", length), builder.constant([0]))
    attended = builder.add("Slice", inputs["attention_mask"], beginning, end, second)
    attended_positions = builder.add("Mul", attended, builder.add("Range", zero, length, one))
    last_attended = builder.add("ReduceMax", attended_positions, second, keepdims=1)
    keep_all = builder.add("Equal", to_keep, zero)
    count = builder.add("Where", keep_all, length, to_keep)
    last = builder.add("Where", keep_all, builder.add("Sub", length, one), last_attended)
    first = builder.add("Add", builder.add("Sub", last, count), one)
    positions = builder.add("Add", first, builder.add("Range", zero, count, one))
    return builder.add("Unsqueeze", builder.add("Max", positions, zero), builder.constant([2]))
