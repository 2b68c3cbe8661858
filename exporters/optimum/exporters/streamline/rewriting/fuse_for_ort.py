"""Fewer and larger steps for ONNX Runtime: products that read the same are one, and a norm takes the sum before it.

The `ort_fusions` of onnxscript match ONNX Runtime's `SimplifiedLayerNormalization`, not the standard `RMSNormalization`
of these graphs, and join the products of attention alone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence
from functools import partial

import numpy as np
import onnx_ir as ir

from .edits import initializer, sizes, take_over
from .excluded_nodes import module_of
from .tied_embedding import transposed

DOMAIN = "com.microsoft"


def is_product(node: ir.Node) -> bool:
    """Whether this is a product with a matrix that the graph holds."""
    weight = node.inputs[1] if node.op_type == "MatMul" else None
    return weight is not None and weight.is_initializer() and weight.shape is not None and len(weight.shape) == 2


def split_biases(graph: ir.Graph) -> None:
    """Make a product and a sum of `Gemm`, where it is just that, in place."""
    for node in list(graph):
        if node.op_type != "Gemm" or len(node.inputs) < 3 or not _is_plain(node):
            continue
        weight = node.inputs[1]
        if weight is not None and node.attributes.get_int("transB", 0) == 1:
            stored, weight = weight, transposed(graph, weight)
            if len(stored.uses()) == 1:
                del graph.initializers[str(stored.name)]
        product = ir.node("MatMul", [node.inputs[0], weight], name=f"{module_of(node)}/MatMul")
        product.outputs[0].type = node.outputs[0].type
        summed = ir.node("Add", [product.outputs[0], node.inputs[2]], name=f"{module_of(node)}/Add")
        graph.insert_before(node, [product, summed])
        take_over(node.outputs[0], summed.outputs[0])
        graph.remove(node, safe=True)


def _is_plain(gemm: ir.Node) -> bool:
    weight = gemm.inputs[1]
    factors = [gemm.attributes.get_float(name, 1.0) for name in ("alpha", "beta")]
    held = weight is not None and weight.is_initializer()
    return held and not gemm.attributes.get_int("transA", 0) and factors == [1.0, 1.0]


def pack_products(graph: ir.Graph, excluded: Collection[ir.Node]) -> None:
    """Make one product of those that read the same, and take its output apart, in place.

    Args:
        excluded: Products to leave as they are.
    """
    together: dict[ir.Value, list[ir.Node]] = defaultdict(list)
    for node in graph:
        if is_product(node) and node not in excluded and node.inputs[0] is not None:
            together[node.inputs[0]].append(node)
    for nodes in together.values():
        if len(nodes) > 1:
            _pack(graph, nodes)


def _pack(graph: ir.Graph, nodes: Sequence[ir.Node]) -> None:
    weights = [node.inputs[1] for node in nodes if node.inputs[1] is not None]
    widths = [sizes(weight)[1] for weight in weights]
    name = "+".join([module_of(nodes[0]), *(module_of(node).rpartition(".")[2] for node in nodes[1:])])
    assert weights[0].dtype is not None
    packed = ir.LazyTensor(
        partial(_side_by_side, weights),
        dtype=weights[0].dtype,
        shape=ir.Shape([sizes(weights[0])[0], sum(widths)]),
        name=f"{name}.weight",
    )
    product = ir.node("MatMul", [nodes[0].inputs[0], initializer(graph, packed)], name=f"{name}/MatMul")
    product.outputs[0].type = nodes[0].outputs[0].type
    taken = initializer(graph, ir.tensor(np.array(widths), name=f"{name}.widths"))
    parts = ir.node("Split", [product.outputs[0], taken], {"axis": -1}, num_outputs=len(nodes), name=f"{name}/Split")
    graph.insert_before(nodes[0], [product, parts])
    for node, part in zip(nodes, parts.outputs, strict=True):
        take_over(node.outputs[0], part)
        graph.remove(node, safe=True)
    for weight in weights:
        if not weight.uses():
            del graph.initializers[str(weight.name)]


def _side_by_side(weights: Sequence[ir.Value]) -> ir.TensorProtocol:
    arrays = [weight.const_value.numpy() for weight in weights if weight.const_value is not None]
    return ir.tensor(np.concatenate(arrays, axis=1))


def fuse_norms(graph: ir.Graph) -> None:
    """Let a norm take the sum that it is of, where ONNX Runtime has one operator for both, in place."""
    for norm in list(graph):
        added = norm.inputs[0].producer() if norm.op_type == "RMSNormalization" and norm.inputs[0] else None
        if added is None or added.op_type != "Add" or not _is_of_one_shape(added):
            continue
        epsilon = norm.attributes.get_float("epsilon", 1e-5)
        fused = ir.node(
            "SkipSimplifiedLayerNormalization",
            [*added.inputs, norm.inputs[1]],
            {"epsilon": epsilon},
            domain=DOMAIN,
            num_outputs=4,
            name=f"{module_of(norm)}/SkipSimplifiedLayerNormalization",
        )
        fused.outputs[1].name = fused.outputs[2].name = ""  # only training reads these
        graph.insert_before(added, fused)
        take_over(added.outputs[0], fused.outputs[3])
        take_over(norm.outputs[0], fused.outputs[0])
        graph.remove([norm, added], safe=True)


def _is_of_one_shape(added: ir.Node) -> bool:
    # Two parts of the residual stream: neither a bias nor a constant, which would be broadcast.
    return all(
        value is not None and not value.is_initializer() and value.producer() is not None for value in added.inputs
    )
