"""Simplify the nodes that make the attention mask: the tracer writes a `GatherND` where a broadcast is enough.

A step that does not recognize the nodes around it changes nothing. The steps need the shapes that the tracer left on
the values, so they run before `public_names.set_public_names`.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass


def simplify_mask(model: ir.Model) -> None:
    """Read `attention_mask` directly, and remove each `Expand` and `And` that changes nothing, in place."""
    for node in list(model.graph):
        if node.op_type == "GatherND":
            _read_in_place(model.graph, node)
        elif node.op_type == "Expand" and _same_shape(node.inputs[0], node.outputs[0]):
            _replace(node, node.inputs[0])
        elif node.op_type == "And":
            left, right = node.inputs
            for kept, other in ((left, right), (right, left)):
                if _is_true(other) and _same_shape(kept, node.outputs[0]):
                    _replace(node, kept)
    RemoveUnusedNodesPass()(model)


def _read_in_place(graph: ir.Graph, gather: ir.Node) -> None:
    """Replace `GatherND` by `Unsqueeze` where it reads `mask[row, column]` for all rows and all columns in order."""
    mask, indices = gather.inputs
    concat = indices.producer() if indices is not None else None
    if mask is None or concat is None or concat.op_type != "Concat" or not _is_mask(mask):
        return
    size_one_axes = [_index_axes(value) for value in concat.inputs]
    if size_one_axes == [(False, True, True, True), (True, True, True, False)]:
        axes = ir.node("Constant", [], {"value_ints": [1, 2]}, metadata_props=dict(gather.metadata_props))
        unsqueeze = ir.node("Unsqueeze", [mask, axes.outputs[0]], metadata_props=dict(gather.metadata_props))
        graph.insert_before(gather, [axes, unsqueeze])
        unsqueeze.outputs[0].shape, unsqueeze.outputs[0].type = gather.outputs[0].shape, gather.outputs[0].type
        _replace(gather, unsqueeze.outputs[0])


def _is_mask(value: ir.Value) -> bool:
    """Whether this is the input `attention_mask`, `[batch, length]`, possibly cast to another type."""
    node, source = value.producer(), value
    while node is not None and node.op_type in ("Cast", "Reshape") and node.inputs[0] is not None:
        source = node.inputs[0]
        node = source.producer()
    both_2d = value.shape is not None and source.shape is not None and len(value.shape) == len(source.shape) == 2
    return both_2d and source.is_graph_input() and source.name == "attention_mask"


def _index_axes(value: ir.Value | None) -> tuple[bool, ...] | None:
    """For indices 0, 1, 2, ... along one axis: whether each axis has size 1 before the indices are broadcast.

    The form that is recognized is `Range`, any number of `Unsqueeze`, `Expand`, and an `Unsqueeze` for a last axis of
    size 1. `None` for any other form.
    """
    for operator in ("Unsqueeze", "Expand"):
        node = value.producer() if value is not None else None
        if node is None or node.op_type != operator:
            return None
        value = node.inputs[0]
    shape = value.shape if value is not None else None
    node = value.producer() if value is not None else None
    while node is not None and node.op_type == "Unsqueeze":
        node = node.inputs[0].producer() if node.inputs[0] is not None else None
    if shape is None or node is None or node.op_type != "Range" or not _starts_at_zero(node):
        return None
    return tuple(size == 1 for size in shape)


def _starts_at_zero(range_node: ir.Node) -> bool:
    """Whether a `Range` starts at 0 and steps by 1."""
    start, _, step = ((None if value is None else value.const_value) for value in range_node.inputs)
    return start is not None and step is not None and start.numpy().item() == 0 and step.numpy().item() == 1


def _is_true(value: ir.Value | None) -> bool:
    return value is not None and value.const_value is not None and bool(value.const_value.numpy().all())


def _same_shape(value: ir.Value | None, other: ir.Value) -> bool:
    return value is not None and value.shape is not None and value.shape == other.shape


def _replace(node: ir.Node, value: ir.Value | None) -> None:
    assert value is not None
    node.outputs[0].replace_all_uses_with(value)
