"""Leaving out of a traced graph what is of no use: traces of skipped sublayers, unread state, repetitions.

A skipped sublayer was dropped before tracing (`optimum.streamline.load`); what is left of it is the addition of a
zero to the residual stream. Knows no architecture. Runs while the tracer's shapes are still on the values.
"""

from __future__ import annotations

from collections.abc import MutableSequence

import onnx_ir as ir
from onnx_ir.passes.common import CommonSubexpressionEliminationPass, RemoveUnusedNodesPass

from .public_names import TRACED_CACHE

# Zero in the first input gives zero out: what a norm after a skipped sublayer is made of.
_KEEP_ZERO = {"RMSNormalization", "Cast"}


def compact(model: ir.Model) -> None:
    """Remove additions of zero, unread state, and what is computed more than once, in place."""
    _drop_zero_additions(model.graph)
    _read_lengths_once(model.graph)
    CommonSubexpressionEliminationPass()(model)  # rotary angles above all, which come out once for each use
    # A sliding window's cache entry also carries the window's size and a count, passed through to an output. The
    # graph keeps every key and masks the window, so nothing reads them; `rename` refuses what something does read.
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
    """Read the batch size and the number of past tokens off the first cache entry, which all entries share."""
    first = next(value for value in graph.inputs if TRACED_CACHE.fullmatch(str(value.name)))
    for node in graph:
        axis = node.attributes.get_int("start", 0)
        of_a_cache = node.op_type == "Shape" and TRACED_CACHE.fullmatch(str(node.inputs[0] and node.inputs[0].name))
        if of_a_cache and axis in (0, 2) and node.attributes.get_int("end", None) == axis + 1:
            node.replace_input_with(0, first)


def _is_zero(node: ir.Node, zero: set[ir.Value]) -> bool:
    if node.op_type == "ConstantOfShape":
        value = node.attributes.get_tensor("value")
        return value is None or not value.numpy().any()
    if node.op_type == "Mul":  # weights are finite: `load` has looked
        return any(value in zero for value in node.inputs if value is not None)
    return node.op_type in _KEEP_ZERO and node.inputs[0] in zero


def _same_shape(value: ir.Value, other: ir.Value) -> bool:
    # What is added may have more axes, and then its zeros broadcast.
    return value.shape is not None and value.shape == other.shape
