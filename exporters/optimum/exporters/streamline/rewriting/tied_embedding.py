"""An embedding that is also the output projection: one weight, looked up row by row and multiplied by, transposed."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor

from .edits import initializer, sizes, take_over


@dataclass(frozen=True)
class Tied:
    """A weight `[vocabulary, width]` and the two nodes that read it, one of them through a transposition."""

    weight: ir.Value
    lookup: ir.Node
    transposition: ir.Node
    product: ir.Node


def find_tied(graph: ir.Graph) -> Tied | None:
    """The tied embedding, if there is one."""
    for transposition in graph:
        weight = transposition.inputs[0] if transposition.op_type == "Transpose" else None
        if weight is None or not weight.is_initializer():
            continue
        readers = {use.node.op_type: use.node for use in weight.uses()}
        products = [use.node for use in transposition.outputs[0].uses()]
        if readers.keys() == {"Gather", "Transpose"} and [each.op_type for each in products] == ["MatMul"]:
            return Tied(weight, readers["Gather"], transposition, products[0])
    return None


def untie(graph: ir.Graph) -> None:
    """Give the output projection a weight of its own, in place, so that it can be quantized."""
    tied = find_tied(graph)
    if tied is None:
        return
    take_over(tied.transposition.outputs[0], transposed(graph, tied.weight))
    graph.remove(tied.transposition, safe=True)


def transposed(graph: ir.Graph, weight: ir.Value) -> ir.Value:
    """Another initializer, with a weight the other way round; read when it is written."""
    assert weight.dtype is not None

    def read() -> ir.TensorProtocol:
        assert weight.const_value is not None
        return TorchTensor(torch.from_numpy(weight.const_value.numpy()).t().contiguous())

    shape, name = ir.Shape(sizes(weight)[::-1]), f"{weight.name}.transposed"
    return initializer(graph, ir.LazyTensor(read, dtype=weight.dtype, shape=shape, name=name))
