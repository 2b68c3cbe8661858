"""The form of an ONNX export that TensorRT takes whole, its caches still growing: `Attention` with one output.

`Attention` that appends to its cache has three, which TensorRT refuses. Here `Concat` appends, and heads are apart, as
such an `Attention` wants them. Runs on a finished export, and knows its names.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir

from optimum.exporters.streamline.graph_files import GRAPH_FILE, LOGITS_TO_KEEP
from optimum.exporters.streamline.rewriting.edits import initializer, replace_value
from optimum.streamline.errors import StreamlineError

from .graph_rules import OPERATORS

GROWING_FILE = "model.tensorrt.onnx"
_QUERY, _KEY, _VALUE, _MASK, _PAST_KEY, _PAST_VALUE = range(6)
_HEADS_APART = [0, 2, 1, 3]
# Beside those of graphs with static caches, what makes masks. Quantized numbers have offsets here, which it refuses.
_TAKEN = (OPERATORS | {"And", "Constant", "Greater", "LessOrEqual", "Not", "Range", "Where"}) - {
    "DequantizeLinear",
    "QuantizeLinear",
}


def write_growing_graph(folder: Path) -> Path:
    """Write the graph of an export anew beside it, its weights those that lie there; returns its file.

    Raises:
        StreamlineError: it has operators that TensorRT does not take, or its file cannot be written.
    """
    target = folder / GROWING_FILE
    if target.is_file():
        return target
    model = ir.load(folder / GRAPH_FILE)
    if LOGITS_TO_KEEP in model.graph.initializers:
        raise StreamlineError(f"{folder}: gives the last logits only; export it without last-logits for TensorRT")
    foreign = {node.op_type for node in model.graph if node.domain not in ("", "ai.onnx") or node.op_type not in _TAKEN}
    if foreign:
        raise StreamlineError(
            f"{folder}: has operators that TensorRT is not known to take ({', '.join(sorted(foreign))}); only graphs "
            "without experts that are not quantized"
        )
    for node in [node for node in model.graph if node.op_type == "Attention" and len(node.inputs) > _PAST_KEY]:
        _append_before(model.graph, node)
    partial = folder / f".{GROWING_FILE}"
    try:
        ir.save(model, partial)  # the weights stay in the file that they lie in
        partial.replace(target)
    except OSError as error:
        raise StreamlineError(f"{target}: {error.strerror}") from None
    return target


def _append_before(graph: ir.Graph, attention: ir.Node) -> None:
    queries, heads = (attention.attributes.get_int(name, 0) for name in ("q_num_heads", "kv_num_heads"))
    query = _apart(graph, attention, _QUERY, queries)
    appended = []
    for new, past, output in ((_KEY, _PAST_KEY, 1), (_VALUE, _PAST_VALUE, 2)):
        parts = [attention.inputs[past], _apart(graph, attention, new, heads)]
        whole = ir.node("Concat", parts, {"axis": 2}, name=f"{attention.name}/Concat_{output}")
        graph.insert_before(attention, whole)
        replace_value(attention.outputs[output], whole.outputs[0])
        appended.append(whole.outputs[0])
    kept = {name: value for name, value in attention.attributes.items() if not name.endswith("_num_heads")}
    made = ir.node("Attention", [query, *appended, attention.inputs[_MASK]], name=attention.name)
    made.attributes.update(kept)
    made.outputs[0].type = attention.outputs[0].type
    graph.insert_before(attention, made)
    replace_value(attention.outputs[0], _joined(graph, attention, made) if queries else made.outputs[0])
    graph.remove(attention, safe=True)


def _apart(graph: ir.Graph, attention: ir.Node, place: int, heads: int) -> ir.Value:
    """`[batch, heads, length, size]` of what is read there, which has its heads side by side unless `heads` is 0."""
    value = attention.inputs[place]
    assert value is not None
    if not heads:
        return value
    shape = initializer(graph, ir.tensor(np.array([0, 0, heads, -1]), name=f"apart_{heads}"))
    split = ir.node("Reshape", [value, shape], name=f"{attention.name}/Reshape_{place}")
    swap = ir.node("Transpose", [split.outputs[0]], {"perm": _HEADS_APART}, name=f"{attention.name}/Transpose_{place}")
    split.outputs[0].type = swap.outputs[0].type = value.type
    graph.insert_before(attention, [split, swap])
    return swap.outputs[0]


def _joined(graph: ir.Graph, attention: ir.Node, made: ir.Node) -> ir.Value:
    """`[batch, length, heads * size]` of what a node with heads apart gives."""
    shape = initializer(graph, ir.tensor(np.array([0, 0, -1]), name="joined"))
    swap = ir.node("Transpose", [made.outputs[0]], {"perm": _HEADS_APART}, name=f"{attention.name}/Transpose_out")
    join = ir.node("Reshape", [swap.outputs[0], shape], name=f"{attention.name}/Reshape_out")
    swap.outputs[0].type = join.outputs[0].type = made.outputs[0].type
    graph.insert_before(attention, [swap, join])
    return join.outputs[0]
