"""A graph in bfloat16 as one in float, which every machine can compute: the same rounded weights, exact arithmetic."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir


def write_widened(graph: Path, target: Path) -> None:
    """Write the graph in float, its weights within: their values are those that bfloat16 has."""
    model = ir.load(graph)
    for value in model.graph.initializers.values():
        if value.dtype == ir.DataType.BFLOAT16:
            assert value.const_value is not None
            value.const_value = ir.tensor(value.const_value.numpy().astype(np.float32), name=value.name)
    for value in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()):
        if value.dtype == ir.DataType.BFLOAT16:
            value.dtype = ir.DataType.FLOAT
    for node in model.graph:
        _widen(node)
    ir.save(model, target, external_data=f"{target.name}.data")


def _widen(node: ir.Node) -> None:
    if node.op_type == "Cast" and node.attributes.get_int("to", 0) == ir.DataType.BFLOAT16:
        node.attributes["to"] = ir.AttrInt64("to", ir.DataType.FLOAT)
    tensor = node.attributes.get_tensor("value", None)
    if tensor is not None and tensor.dtype == ir.DataType.BFLOAT16:
        node.attributes["value"] = ir.AttrTensor("value", ir.tensor(tensor.numpy().astype(np.float32)))
    for value in node.outputs:
        value.type = None
