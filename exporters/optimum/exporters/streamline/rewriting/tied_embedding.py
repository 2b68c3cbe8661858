"""Find and untie a tied embedding: one weight that is both the input embedding and the output projection.

The embedding reads its rows (`Gather`); the output projection multiplies by its transpose (`Transpose`, `MatMul`).
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor

from .graph_helpers import initializer, read_weight, replace_value, static_shape


@dataclass(frozen=True)
class TiedEmbedding:
    """A tied embedding and the nodes that read it.

    Args:
        weight: The weight `[vocabulary, width]`.
        lookup: The `Gather` that looks up tokens.
        transposition: The `Transpose` between the weight and the output projection.
        product: The `MatMul` of the output projection.
    """

    weight: ir.Value
    lookup: ir.Node
    transposition: ir.Node
    product: ir.Node


def find_tied_embedding(graph: ir.Graph) -> TiedEmbedding | None:
    """The graph's tied embedding; `None` if it has none."""
    for transposition in graph:
        weight = transposition.inputs[0] if transposition.op_type == "Transpose" else None
        if weight is None or not weight.is_initializer():
            continue
        readers = {use.node.op_type: use.node for use in weight.uses()}
        matmuls = [use.node for use in transposition.outputs[0].uses()]
        if readers.keys() == {"Gather", "Transpose"} and [each.op_type for each in matmuls] == ["MatMul"]:
            return TiedEmbedding(weight, readers["Gather"], transposition, matmuls[0])
    return None


def untie_embedding(graph: ir.Graph) -> None:
    """Give the output projection its own copy of the weight, in place, so that it can be quantized alone."""
    tied = find_tied_embedding(graph)
    if tied is None:
        return
    replace_value(tied.transposition.outputs[0], transposed(graph, tied.weight))
    graph.remove(tied.transposition, safe=True)


def transposed(graph: ir.Graph, weight: ir.Value) -> ir.Value:
    """Add an initializer that holds the transpose of a weight; its values are read when the graph is saved."""
    assert weight.dtype is not None

    def read() -> ir.TensorProtocol:
        return TorchTensor(torch.from_numpy(read_weight(weight)).t().contiguous())

    shape, name = ir.Shape(static_shape(weight)[::-1]), f"{weight.name}.transposed"
    return initializer(graph, ir.LazyTensor(read, dtype=weight.dtype, shape=shape, name=name))
