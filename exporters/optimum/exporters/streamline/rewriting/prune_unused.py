"""Remove from a traced graph what skipped sublayers left, cached state that nothing reads, and repeated computation.

Loading replaces each skipped sublayer by zeros (`optimum.streamline.load`), so the traced graph adds a zero to the
residual stream in its place. The code works for every architecture. It needs the shapes that the tracer left on the
values, so it runs before `public_names.set_public_names`.
"""

from __future__ import annotations

from collections.abc import MutableSequence

import onnx_ir as ir
from onnx_ir.passes.common import CommonSubexpressionEliminationPass, RemoveUnusedNodesPass

from .public_names import TRACED_CACHE

# Operators that return zero if their first input is zero. A norm after a skipped sublayer consists of them.
_ZERO_PRESERVING = {"RMSNormalization", "Cast"}


def remove_unused(model: ir.Model) -> None:
    """Remove additions of zero, state that nothing reads, and repeated computation, in place."""
    _drop_zero_additions(model.graph)
    _read_lengths_once(model.graph)
    CommonSubexpressionEliminationPass()(model)  # the tracer repeats rotary angles at each use, above all
    # A sliding window's cache entry also carries the window size and a token count, from an input to an output. The
    # graph keeps every key and masks the window, so nothing reads them. `set_public_names` refuses one that is read.
    _remove(model.graph.outputs, [value for value in model.graph.outputs if _is_bookkeeping(value)])
    RemoveUnusedNodesPass()(model)
    _remove(model.graph.inputs, [value for value in model.graph.inputs if _is_bookkeeping(value) and not value.uses()])


def _is_bookkeeping(value: ir.Value) -> bool:
    name = str(value.name)
    return "past_key_values" in name and not TRACED_CACHE.fullmatch(name)


def _remove(values: MutableSequence[ir.Value], unwanted: list[ir.Value]) -> None:
    for value in unwanted:
        values.remove(value)


def _drop_zero_additions(graph: ir.Graph) -> None:
    zero: set[ir.Value] = set()
    for node in graph:
        if _is_zero(node, zero):
            zero.update(node.outputs)
        elif node.op_type == "Add":
            left, right = node.inputs
            for kept, other in ((left, right), (right, left)):
                if other in zero and kept is not None and _same_shape(kept, node.outputs[0]):
                    node.outputs[0].replace_all_uses_with(kept)


def _read_lengths_once(graph: ir.Graph) -> None:
    """Make every node that reads batch size or past length from a cache read them from the first cache: all agree."""
    first = next(value for value in graph.inputs if TRACED_CACHE.fullmatch(str(value.name)))
    for node in graph:
        axis = node.attributes.get_int("start", 0)
        reads_cache = node.op_type == "Shape" and TRACED_CACHE.fullmatch(str(node.inputs[0] and node.inputs[0].name))
        if reads_cache and axis in (0, 2) and node.attributes.get_int("end", None) == axis + 1:
            node.replace_input_with(0, first)


def _is_zero(node: ir.Node, zero: set[ir.Value]) -> bool:
    if node.op_type == "ConstantOfShape":
        value = node.attributes.get_tensor("value")
        return value is None or not value.numpy().any()
    if node.op_type == "Mul":  # zero times a weight is zero, since `load` refuses weights that are not finite
        return any(value in zero for value in node.inputs if value is not None)
    return node.op_type in _ZERO_PRESERVING and node.inputs[0] in zero


def _same_shape(value: ir.Value, other: ir.Value) -> bool:
    # A zero with more axes would broadcast the other operand, so removing the addition would change the shape.
    return value.shape is not None and value.shape == other.shape
