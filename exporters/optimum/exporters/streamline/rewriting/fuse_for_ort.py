"""Fuse nodes for ONNX Runtime: matmuls that read the same value become one, and a norm takes in the sum before it.

"Matmul" stands for a multiplication by a weight matrix that the graph holds. The `ort_fusions` of onnxscript do not do
this: they match `SimplifiedLayerNormalization` and not the standard `RMSNormalization`, and fuse the matmuls of
attention only.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence
from functools import partial

import numpy as np
import onnx_ir as ir

from .excluded_nodes import module_of
from .graph_helpers import initializer, read_weight, replace_value, static_shape
from .tied_embedding import transposed

DOMAIN = "com.microsoft"


def is_weight_matmul(node: ir.Node) -> bool:
    """Whether this is a `MatMul` by a matrix that the graph holds."""
    weight = node.inputs[1] if node.op_type == "MatMul" else None
    return weight is not None and weight.is_initializer() and weight.shape is not None and len(weight.shape) == 2


def split_biases(graph: ir.Graph) -> None:
    """Replace each plain `Gemm` (no scaling, no transposed activation) by `MatMul` and `Add`, in place."""
    for node in list(graph):
        if node.op_type != "Gemm" or len(node.inputs) < 3 or not _is_plain(node):
            continue
        weight = node.inputs[1]
        if weight is not None and node.attributes.get_int("transB", 0) == 1:
            stored, weight = weight, transposed(graph, weight)
            if len(stored.uses()) == 1:
                del graph.initializers[str(stored.name)]
        matmul = ir.node("MatMul", [node.inputs[0], weight], name=f"{module_of(node)}/MatMul")
        matmul.outputs[0].type = node.outputs[0].type
        add = ir.node("Add", [matmul.outputs[0], node.inputs[2]], name=f"{module_of(node)}/Add")
        graph.insert_before(node, [matmul, add])
        replace_value(node.outputs[0], add.outputs[0])
        graph.remove(node, safe=True)


def _is_plain(gemm: ir.Node) -> bool:
    weight = gemm.inputs[1]
    factors = [gemm.attributes.get_float(name, 1.0) for name in ("alpha", "beta")]
    has_weight = weight is not None and weight.is_initializer()
    return has_weight and not gemm.attributes.get_int("transA", 0) and factors == [1.0, 1.0]


def pack_matmuls(graph: ir.Graph, excluded: Collection[ir.Node]) -> None:
    """Replace the matmuls that read the same value by one, whose output is split again, in place.

    Queries, keys and values of an attention become one matmul, as do the gate and up projections of an MLP.

    Args:
        graph: The graph.
        excluded: Matmuls to leave unchanged.
    """
    by_input: dict[ir.Value, list[ir.Node]] = defaultdict(list)
    for node in graph:
        if is_weight_matmul(node) and node not in excluded and node.inputs[0] is not None:
            by_input[node.inputs[0]].append(node)
    for nodes in by_input.values():
        if len(nodes) > 1:
            _pack(graph, nodes)


def _pack(graph: ir.Graph, nodes: Sequence[ir.Node]) -> None:
    weights = [node.inputs[1] for node in nodes if node.inputs[1] is not None]
    widths = [static_shape(weight)[1] for weight in weights]
    name = "+".join([module_of(nodes[0]), *(module_of(node).rpartition(".")[2] for node in nodes[1:])])
    assert weights[0].dtype is not None
    packed = ir.LazyTensor(
        partial(_concatenated, weights),
        dtype=weights[0].dtype,
        shape=ir.Shape([static_shape(weights[0])[0], sum(widths)]),
        name=f"{name}.weight",
    )
    matmul = ir.node("MatMul", [nodes[0].inputs[0], initializer(graph, packed)], name=f"{name}/MatMul")
    matmul.outputs[0].type = nodes[0].outputs[0].type
    split_sizes = initializer(graph, ir.tensor(np.array(widths), name=f"{name}.widths"))
    split_inputs = [matmul.outputs[0], split_sizes]
    split = ir.node("Split", split_inputs, {"axis": -1}, num_outputs=len(nodes), name=f"{name}/Split")
    graph.insert_before(nodes[0], [matmul, split])
    for node, part in zip(nodes, split.outputs, strict=True):
        replace_value(node.outputs[0], part)
        graph.remove(node, safe=True)
    for weight in weights:
        if not weight.uses():
            del graph.initializers[str(weight.name)]


def _concatenated(weights: Sequence[ir.Value]) -> ir.TensorProtocol:
    """The weights `[depth, width]` beside one another, `[depth, sum of widths]`."""
    return ir.tensor(np.concatenate([read_weight(weight) for weight in weights], axis=1))


def fuse_norms(graph: ir.Graph) -> None:
    """Fuse each residual addition and the RMS norm that reads it into ONNX Runtime's operator for both, in place."""
    for norm in list(graph):
        add = norm.inputs[0].producer() if norm.op_type == "RMSNormalization" and norm.inputs[0] else None
        if add is None or add.op_type != "Add" or not _adds_activations(add):
            continue
        epsilon = norm.attributes.get_float("epsilon", 1e-5)
        fused = ir.node(
            "SkipSimplifiedLayerNormalization",
            [*add.inputs, norm.inputs[1]],
            {"epsilon": epsilon},
            domain=DOMAIN,
            num_outputs=4,
            name=f"{module_of(norm)}/SkipSimplifiedLayerNormalization",
        )
        fused.outputs[1].name = fused.outputs[2].name = ""  # the mean and inverse deviation, for training
        graph.insert_before(add, fused)
        replace_value(add.outputs[0], fused.outputs[3])
        replace_value(norm.outputs[0], fused.outputs[0])
        graph.remove([norm, add], safe=True)


def _adds_activations(add: ir.Node) -> bool:
    """Whether both operands are computed: a bias or a constant would need broadcasting."""
    return all(
        value is not None and not value.is_initializer() and value.producer() is not None for value in add.inputs
    )
