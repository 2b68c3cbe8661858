"""What more than one rewriting of a graph needs: small edits, a list of operators."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.convenience import replace_all_uses_with

PRODUCTS = ("MatMul", "Gemm")
"""Operators that multiply by a weight."""


def take_over(old: ir.Value, new: ir.Value) -> None:
    """Let `new` stand wherever `old` stood, under its name, also as an output of the graph."""
    new.shape, new.type = old.shape, old.type
    name = old.name
    replace_all_uses_with(old, new, replace_graph_outputs=True)
    old.name, new.name = f"{name}/replaced", name


def initializer(graph: ir.Graph, tensor: ir.TensorProtocol) -> ir.Value:
    """The initializer of the tensor's name, made if there is none."""
    name = str(tensor.name)
    if name not in graph.initializers:
        shape = ir.Shape(tensor.shape.numpy())
        graph.initializers[name] = ir.Value(
            name=name, shape=shape, type=ir.TensorType(tensor.dtype), const_value=tensor
        )
    return graph.initializers[name]


def sizes(value: ir.Value | None) -> tuple[int, ...]:
    """The shape of what the graph holds."""
    assert value is not None
    assert value.shape is not None
    return value.shape.numpy()
