"""Convert a half-precision graph to float32, so that any CPU can compute it. The weights keep their rounded values."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import onnx_ir as ir

from .graph_helpers import read_tensor

_NARROW = (ir.DataType.BFLOAT16, ir.DataType.FLOAT16)


def write_float32(graph: Path, target: Path) -> None:
    """Write a copy of a graph in which float16 and bfloat16 become float32. Memory holds one weight at a time.

    Args:
        graph: The `.onnx` file to read, its weights beside it.
        target: The `.onnx` file to write; its weights go to the same name with `.data`.
    """
    model = ir.load(graph)
    for value in model.graph.initializers.values():
        if value.dtype in _NARROW:
            assert value.const_value is not None
            value.const_value = ir.LazyTensor(
                partial(_as_float32, value.const_value),
                dtype=ir.DataType.FLOAT,
                shape=ir.Shape(value.const_value.shape.numpy()),
                name=value.name,
            )
    computed = [value for node in model.graph for value in node.outputs]
    for value in (*model.graph.inputs, *model.graph.initializers.values(), *computed):
        if value.dtype in _NARROW:
            value.dtype = ir.DataType.FLOAT
    for node in model.graph:
        _convert(node)
    ir.save(model, target, external_data=f"{target.name}.data")


def _as_float32(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    return ir.tensor(read_tensor(tensor).astype(np.float32))


def _convert(node: ir.Node) -> None:
    """Convert the types that a node names in attributes."""
    if node.op_type == "Cast" and node.attributes.get_int("to", 0) in _NARROW:
        node.attributes["to"] = ir.AttrInt64("to", ir.DataType.FLOAT)
    tensor = node.attributes.get_tensor("value", None)
    if tensor is not None and tensor.dtype in _NARROW:
        node.attributes["value"] = ir.AttrTensor("value", ir.tensor(tensor.numpy().astype(np.float32)))
