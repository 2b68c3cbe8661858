"""Convert a finished ONNX export so that TensorRT takes the whole graph; its caches keep growing.

TensorRT refuses an `Attention` that appends to its cache, because it has three outputs. Here `Concat` appends, and
`Attention` has one output and reads `[batch, heads, length, size]`. ONNX Runtime's TensorRT provider runs the result.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir

from optimum.exporters.streamline.graph_files import GRAPH_FILE, LOGITS_TO_KEEP
from optimum.exporters.streamline.rewriting.graph_helpers import initializer, replace_value
from optimum.streamline.errors import StreamlineError

from .graph_rules import OPERATORS

GROWING_FILE = "model.tensorrt.onnx"
_QUERY, _KEY, _VALUE, _MASK, _PAST_KEY, _PAST_VALUE = range(6)
_SWAPPED = [0, 2, 1, 3]  # the axes with length and heads swapped
# A graph with growing caches also computes masks. A quantized ONNX export has zero points, which TensorRT refuses.
_SUPPORTED_OPERATORS = (OPERATORS | {"And", "Constant", "Greater", "LessOrEqual", "Not", "Range", "Where"}) - {
    "DequantizeLinear",
    "QuantizeLinear",
}


def write_growing_graph(folder: Path) -> Path:
    """Write the converted graph into the folder of an ONNX export, unless it is there already; returns its file.

    The converted graph uses the weight file of the export.

    Args:
        folder: The artifact's folder.

    Raises:
        StreamlineError: the export has operators that TensorRT is not known to take or returns the last logits only,
            or the file cannot be written.
    """
    target = folder / GROWING_FILE
    if target.is_file():
        return target
    model = ir.load(folder / GRAPH_FILE)
    if LOGITS_TO_KEEP in model.graph.initializers:
        raise StreamlineError(f"{folder}: gives the last logits only; export it without last-logits for TensorRT")
    unsupported = {
        node.op_type
        for node in model.graph
        if node.domain not in ("", "ai.onnx") or node.op_type not in _SUPPORTED_OPERATORS
    }
    if unsupported:
        raise StreamlineError(
            f"{folder}: has operators that TensorRT is not known to take ({', '.join(sorted(unsupported))}); export a "
            "model without experts, and do not quantize it"
        )
    for node in [node for node in model.graph if node.op_type == "Attention" and len(node.inputs) > _PAST_KEY]:
        _append_before(model.graph, node)
    partial = folder / f".{GROWING_FILE}"
    try:
        ir.save(model, partial)  # the weights stay in the export's weight file
        partial.replace(target)
    except OSError as error:
        raise StreamlineError(f"{target}: {error.strerror}") from None
    return target


def _append_before(graph: ir.Graph, attention: ir.Node) -> None:
    """Replace an `Attention` that appends by two `Concat`s and an `Attention` that reads whole keys and values."""
    queries, heads = (attention.attributes.get_int(name, 0) for name in ("q_num_heads", "kv_num_heads"))
    query = _split_heads(graph, attention, _QUERY, queries)
    appended = []
    for new, past, output in ((_KEY, _PAST_KEY, 1), (_VALUE, _PAST_VALUE, 2)):
        parts = [attention.inputs[past], _split_heads(graph, attention, new, heads)]
        whole = ir.node("Concat", parts, {"axis": 2}, name=f"{attention.name}/Concat_{output}")
        graph.insert_before(attention, whole)
        replace_value(attention.outputs[output], whole.outputs[0])
        appended.append(whole.outputs[0])
    kept = {name: value for name, value in attention.attributes.items() if not name.endswith("_num_heads")}
    plain = ir.node("Attention", [query, *appended, attention.inputs[_MASK]], name=attention.name)
    plain.attributes.update(kept)
    plain.outputs[0].type = attention.outputs[0].type
    graph.insert_before(attention, plain)
    replace_value(attention.outputs[0], _join_heads(graph, attention, plain) if queries else plain.outputs[0])
    graph.remove(attention, safe=True)


def _split_heads(graph: ir.Graph, attention: ir.Node, index: int, heads: int) -> ir.Value:
    """Input `index` of an attention as `[batch, heads, length, size]`; it has that form already if `heads` is 0."""
    value = attention.inputs[index]
    assert value is not None
    if not heads:
        return value
    shape = initializer(graph, ir.tensor(np.array([0, 0, heads, -1]), name=f"apart_{heads}"))
    split = ir.node("Reshape", [value, shape], name=f"{attention.name}/Reshape_{index}")
    swap = ir.node("Transpose", [split.outputs[0]], {"perm": _SWAPPED}, name=f"{attention.name}/Transpose_{index}")
    split.outputs[0].type = swap.outputs[0].type = value.type
    graph.insert_before(attention, [split, swap])
    return swap.outputs[0]


def _join_heads(graph: ir.Graph, attention: ir.Node, plain: ir.Node) -> ir.Value:
    """The output `[batch, heads, length, size]` of the new attention `plain` as `[batch, length, heads * size]`."""
    shape = initializer(graph, ir.tensor(np.array([0, 0, -1]), name="joined"))
    swap = ir.node("Transpose", [plain.outputs[0]], {"perm": _SWAPPED}, name=f"{attention.name}/Transpose_out")
    join = ir.node("Reshape", [swap.outputs[0], shape], name=f"{attention.name}/Reshape_out")
    swap.outputs[0].type = join.outputs[0].type = plain.outputs[0].type
    graph.insert_before(attention, [swap, join])
    return join.outputs[0]
