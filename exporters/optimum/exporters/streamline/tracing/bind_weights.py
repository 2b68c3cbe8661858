"""Connect a graph's initializers to the model's offloaded weights, so that they are read only when the graph is saved.

The code works for every architecture: it goes by parameter names alone.
"""

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
    """Give each initializer without a value the model parameter of the same name, and fold constants. In place.

    A node whose inputs are one such weight and constants is folded: an initializer with its result replaces it. Each
    value is an `ir.LazyTensor`: saving the graph reads the parameter and computes the folded nodes, and nothing stays
    in memory.

    Args:
        model: The graph. Each initializer without a value has the name of a parameter of `source`.
        source: The model that holds the parameters, on disk or in memory.
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
    """Whether a node's inputs are constants and exactly one weight, which no other node reads."""
    weight_inputs = [value for value in node.inputs if value in weights]
    all_constant = all(value is None or value.const_value is not None for value in node.inputs)
    return len(weight_inputs) == 1 and len(weight_inputs[0].uses()) == 1 and all_constant


def _fold(graph: ir.Graph, node: ir.Node, weight: ir.Value) -> list[ir.Value]:
    """Replace a node by initializers that hold its outputs; returns them.

    The first takes the weight's name, further ones add a number to it.
    """
    name = str(graph.initializers.pop(str(weight.name)).name)
    folded = []
    for index, output in enumerate(node.outputs):
        value = ir.Value(name=f"{name}.{index}" if index else name, shape=output.shape, type=output.type)
        value.const_value = _lazy(value, _computed(node, index))
        graph.initializers[str(value.name)] = value
        output.replace_all_uses_with(value)
        folded.append(value)
    graph.remove(node, safe=True)
    return folded


def _computed(node: ir.Node, index: int) -> Callable[[], ir.TensorProtocol]:
    """A function that computes output `index` of a node whose inputs are constants."""
    evaluator = ReferenceEvaluator(ir.to_proto(node), opsets={"": OPSET})
    constants = tuple((str(each.name), each.const_value) for each in node.inputs if each is not None)
    return lambda: TorchTensor(_contiguous(_outputs(evaluator, constants)[index]))


def _contiguous(array: npt.NDArray[Any]) -> torch.Tensor:
    """The array as a contiguous tensor. Torch copies a transposed array several times faster than numpy."""
    if array.dtype == ir.DataType.BFLOAT16.numpy():  # ml_dtypes' type, which torch.from_numpy refuses
        return torch.from_numpy(array.view(np.int16)).contiguous().view(torch.bfloat16)
    return torch.from_numpy(array).contiguous()


@lru_cache(maxsize=1)  # a node may split the stacked weights of all experts: read the stack once for all its outputs
def _outputs(evaluator: ReferenceEvaluator, constants: tuple[tuple[str, Any], ...]) -> Any:
    return evaluator.run(None, {name: tensor.numpy() for name, tensor in constants})


def _lazy(value: ir.Value, read: Callable[[], ir.TensorProtocol]) -> ir.LazyTensor:
    assert value.dtype is not None
    assert value.shape is not None
    return ir.LazyTensor(read, dtype=value.dtype, shape=value.shape, name=value.name)
