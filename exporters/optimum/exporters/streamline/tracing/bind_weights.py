"""A graph's weights, read from the checkpoint one at a time as the graph is written. Knows no architecture."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from onnx.reference import ReferenceEvaluator
from onnx_ir.tensor_adapters import TorchTensor
from transformers import PreTrainedModel

from optimum.streamline.models.offloaded_weights import read_parameter

from .trace import OPSET


def bind_weights(model: ir.Model, source: PreTrainedModel) -> None:
    """Give each initializer that has no value the parameter of its name, in place, and fold what follows from it alone.

    Values are read, and operators applied to them, whenever they are asked for: none is kept in memory.

    Args:
        source: What the parameters are read from.
    """
    weights = {value for value in model.graph.initializers.values() if value.const_value is None}
    for value in weights:
        value.const_value = _lazy(value, partial(_parameter, source, str(value.name)))
    for node in model.graph:
        if _is_foldable(node, weights):
            weight = next(value for value in node.inputs if value in weights)
            weights.update(_fold(model.graph, node, weight))


def _parameter(source: PreTrainedModel, name: str) -> ir.TensorProtocol:
    return TorchTensor(read_parameter(source, name).contiguous(), name=name)


def _is_foldable(node: ir.Node, weights: set[ir.Value]) -> bool:
    """Whether a node makes something of one weight that nothing else reads, and of constants."""
    read = [value for value in node.inputs if value in weights]
    constant = all(value is None or value.const_value is not None for value in node.inputs)
    return len(read) == 1 and len(read[0].uses()) == 1 and constant


def _fold(graph: ir.Graph, node: ir.Node, weight: ir.Value) -> list[ir.Value]:
    """Put what a node makes of a weight in its place; under the weight's own name where it makes one thing."""
    name = str(graph.initializers.pop(str(weight.name)).name)
    folded = []
    for place, output in enumerate(node.outputs):
        value = ir.Value(name=f"{name}.{place}" if place else name, shape=output.shape, type=output.type)
        value.const_value = _lazy(value, _computed(node, place))
        graph.initializers[str(value.name)] = value
        output.replace_all_uses_with(value)
        folded.append(value)
    graph.remove(node, safe=True)
    return folded


def _computed(node: ir.Node, place: int) -> Callable[[], ir.TensorProtocol]:
    """A function that computes one of a node's outputs."""
    evaluator = ReferenceEvaluator(ir.to_proto(node), opsets={"": OPSET})
    constants = tuple((str(each.name), each.const_value) for each in node.inputs if each is not None)
    return lambda: TorchTensor(_in_order(_outputs(evaluator, constants)[place]))


def _in_order(array: npt.NDArray[Any]) -> torch.Tensor:
    """An array that may be transposed as a contiguous tensor, which torch is several times faster at than numpy."""
    if array.dtype == ir.DataType.BFLOAT16.numpy():  # not one of numpy's own, and so unknown to torch
        return torch.from_numpy(array.view(np.int16)).contiguous().view(torch.bfloat16)
    return torch.from_numpy(array).contiguous()


@lru_cache(maxsize=1)  # a stack of experts' weights is taken apart one by one, and read once for all of them
def _outputs(evaluator: ReferenceEvaluator, constants: tuple[tuple[str, Any], ...]) -> Any:
    return evaluator.run(None, {name: tensor.numpy() for name, tensor in constants})


def _lazy(value: ir.Value, read: Callable[[], ir.TensorProtocol]) -> ir.LazyTensor:
    assert value.dtype is not None
    assert value.shape is not None
    return ir.LazyTensor(read, dtype=value.dtype, shape=value.shape, name=value.name)
