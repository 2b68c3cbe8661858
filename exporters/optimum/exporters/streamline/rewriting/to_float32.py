"""A graph in half precision as one in float, which every machine can compute: with the same rounded weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir

_NARROW = (ir.DataType.BFLOAT16, ir.DataType.FLOAT16)


def write_widened(graph: Path, target: Path) -> None:
    """Write the graph in float, its weights within: their values are those that they had in half precision."""
    model = ir.load(graph)
    for value in model.graph.initializers.values():
        if value.dtype in _NARROW:
            assert value.const_value is not None
            value.const_value = ir.tensor(value.const_value.numpy().astype(np.float32), name=value.name)
    for value in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()):
        if value.dtype in _NARROW:
            value.dtype = ir.DataType.FLOAT
    for node in model.graph:
        _widen(node)
    ir.save(model, target, external_data=f"{target.name}.data")


def _widen(node: ir.Node) -> None:
    if node.op_type == "Cast" and node.attributes.get_int("to", 0) in _NARROW:
        node.attributes["to"] = ir.AttrInt64("to", ir.DataType.FLOAT)
    tensor = node.attributes.get_tensor("value", None)
    if tensor is not None and tensor.dtype in _NARROW:
        node.attributes["value"] = ir.AttrTensor("value", ir.tensor(tensor.numpy().astype(np.float32)))
    for value in node.outputs:
        value.type = None
