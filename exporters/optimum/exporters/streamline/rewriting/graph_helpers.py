"""Small graph edits, and a list of operators, that several files of this package use."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.convenience import replace_all_uses_with

MATMUL_OPERATORS = ("MatMul", "Gemm")
"""The operators that multiply an activation by a weight matrix."""


def replace_value(old: ir.Value, new: ir.Value) -> None:
    """Replace the value `old` by `new` everywhere, also as a graph output; `new` takes its name, shape and type."""
    new.shape, new.type = old.shape, old.type
    name = old.name
    replace_all_uses_with(old, new, replace_graph_outputs=True)
    old.name, new.name = f"{name}/replaced", name


def initializer(graph: ir.Graph, tensor: ir.TensorProtocol) -> ir.Value:
    """The graph's initializer with the tensor's name; if the graph has none, it is added with this tensor."""
    name = str(tensor.name)
    if name not in graph.initializers:
        shape = ir.Shape(tensor.shape.numpy())
        graph.initializers[name] = ir.Value(
            name=name, shape=shape, type=ir.TensorType(tensor.dtype), const_value=tensor
        )
    return graph.initializers[name]


def read_weight(weight: ir.Value) -> npt.NDArray[Any]:
    """A copy of the values of an initializer (`read_tensor`)."""
    assert weight.const_value is not None
    return read_tensor(weight.const_value)


def read_tensor(tensor: ir.TensorProtocol) -> npt.NDArray[Any]:
    """A copy of the values of a tensor. Its file is not left mapped, because mapped pages count as memory."""
    values = np.array(tensor.numpy())
    if isinstance(tensor, ir.ExternalTensor):
        tensor.release()
    return values


def static_shape(value: ir.Value | None) -> tuple[int, ...]:
    """The shape of a value whose sizes are all known, such as an initializer."""
    assert value is not None
    assert value.shape is not None
    return value.shape.numpy()
