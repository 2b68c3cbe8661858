"""Simplify the nodes around `Attention`: let the operator itself repeat heads, append to the cache and split heads.

The tracer writes each of these as separate nodes. A step that does not recognize the nodes around an `Attention`
changes nothing. The code works for every architecture. It needs the shapes that the tracer left on the values, so it
runs before `public_names.set_public_names`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from .graph_helpers import initializer, replace_value
from .public_names import TRACED_CACHE

_SWAP_LENGTH_AND_HEADS = (0, 2, 1, 3)  # between [batch, length, heads, size] and [batch, heads, length, size]
QUERY, KEY, VALUE, MASK = range(4)


def simplify_attention(model: ir.Model) -> None:
    """Use grouped-query heads, and remove the zeroing of rows that attend to nothing, in place."""
    _take_steps(model, _share_heads, _keep_masked_rows)


def append_within_attention(model: ir.Model) -> None:
    """Let `Attention` append to the cache, and read and return `[batch, length, heads * size]`, in place."""
    _take_steps(model, _append_to_cache, _flatten_heads)


def _take_steps(model: ir.Model, *steps: Callable[[ir.Graph, ir.Node], None]) -> None:
    for step in steps:
        for node in list(model.graph):
            if node.op_type == "Attention" and len(node.inputs) > MASK:
                step(model.graph, node)
        RemoveUnusedNodesPass()(model)  # an unused node still counts as a reader of its inputs


def _share_heads(graph: ir.Graph, attention: ir.Node) -> None:
    """Read keys and values before they are repeated for each query head: `Attention` repeats them itself."""
    unrepeated = [_before_repetition(attention.inputs[index]) for index in (KEY, VALUE)]
    if all(unrepeated):
        for index, value in zip((KEY, VALUE), unrepeated, strict=True):
            attention.replace_input_with(index, value)


def _before_repetition(value: ir.Value | None) -> ir.Value | None:
    """The keys or values `[batch, heads, length, size]` before each head is repeated in a row; `None` if none is."""
    for operator in ("Reshape", "Expand", "Unsqueeze"):
        node = value.producer() if value is not None else None
        if node is None or node.op_type != operator:
            return None
        value = node.inputs[0]
        axes = node.inputs[1]
    repeated = axes is not None and axes.const_value is not None and axes.const_value.numpy().tolist() == [2]
    return value if repeated and value is not None and value.shape is not None and len(value.shape) == 4 else None


def _keep_masked_rows(graph: ir.Graph, attention: ir.Node) -> None:
    """Remove the `Where` that zeroes the output of padding rows, and keep that output finite.

    Nobody reads the output of a padding row, but it must not be NaN. Such a row masks every key, so all its scores
    are the lowest number of the type, and in half precision they overflow when anything is added. Half the lowest
    number masks as well and does not overflow.
    """
    mask, (attended,) = attention.inputs[MASK], attention.outputs
    wheres = [use.node for use in attended.uses()]
    scale = mask.producer() if mask is not None else None
    if len(wheres) != 1 or wheres[0].op_type != "Where" or wheres[0].inputs[2] is not attended or scale is None:
        return
    masked_score = scale.inputs[1] if scale.op_type == "Mul" else None
    if masked_score is None or masked_score.const_value is None or masked_score.dtype is None:
        return
    if not _is_zero(wheres[0].inputs[1]):
        return
    lowest = float(masked_score.dtype.min)
    traced_score = masked_score.const_value.numpy()
    if traced_score.size == 1 and traced_score.item() in (lowest, lowest / 2):
        name = f"half_of_least_{masked_score.dtype.name.lower()}"
        half = initializer(graph, ir.tensor(np.array(lowest / 2, traced_score.dtype), name=name))
        scale.replace_input_with(1, half)
        wheres[0].outputs[0].replace_all_uses_with(attended)


def _is_zero(value: ir.Value | None) -> bool:
    return value is not None and value.const_value is not None and not value.const_value.numpy().any()


def _append_to_cache(graph: ir.Graph, attention: ir.Node) -> None:
    """Give `Attention` the past keys and values as inputs, so that it appends the new ones itself."""
    query, mask = attention.inputs[QUERY], attention.inputs[MASK]
    appended = [_past_and_new(attention.inputs[index]) for index in (KEY, VALUE)]
    if not all(appended):
        return
    (past_key, key), (past_value, value) = (each for each in appended if each is not None)
    new_attention = _node(attention, [query, key, value, mask, past_key, past_value], outputs=3)
    graph.insert_before(attention, new_attention)
    for old, new in zip((attention.outputs[0], *attention.inputs[KEY:MASK]), new_attention.outputs, strict=True):
        assert old is not None
        replace_value(old, new)


def _past_and_new(value: ir.Value | None) -> tuple[ir.Value, ir.Value] | None:
    """A cache input and the keys or values appended to it, if `value` is their `Concat` and has no other reader."""
    node = value.producer() if value is not None else None
    if node is None or node.op_type != "Concat" or len(node.inputs) != 2 or len(node.outputs[0].uses()) != 1:
        return None
    past, new = node.inputs
    axis = node.attributes.get_int("axis", 0)
    if past is None or new is None or axis not in (-2, 2) or not node.outputs[0].is_graph_output():
        return None
    return (past, new) if past.is_graph_input() and TRACED_CACHE.fullmatch(str(past.name)) else None


def _flatten_heads(graph: ir.Graph, attention: ir.Node) -> None:
    """Let `Attention` read queries, keys and values as the projections return them, and return the same form.

    That form is `[batch, length, heads * size]`. The nodes that split and join heads become unused.
    """
    heads = [_heads(attention.inputs[index]) for index in (QUERY, KEY, VALUE)]
    joined = _joined(attention.outputs[0])
    if joined is None or not all(heads) or not all(map(_can_flatten, attention.inputs[QUERY:MASK])):
        return
    flat = [_flat(graph, attention.inputs[index], heads[index]) for index in (QUERY, KEY, VALUE)]
    new_attention = _node(attention, [*flat, *attention.inputs[MASK:]], outputs=len(attention.outputs))
    new_attention.attributes["q_num_heads"] = ir.AttrInt64("q_num_heads", heads[QUERY])
    new_attention.attributes["kv_num_heads"] = ir.AttrInt64("kv_num_heads", heads[KEY])
    graph.insert_before(attention, new_attention)
    replace_value(joined, new_attention.outputs[0])
    for old, new in zip(attention.outputs[1:], new_attention.outputs[1:], strict=True):
        replace_value(old, new)


def _heads(value: ir.Value | None) -> int:
    """The number of heads of a value `[batch, heads, length, size]`; 0 if unknown."""
    size = value.shape[1] if value is not None and value.shape is not None and len(value.shape) == 4 else None
    return size if isinstance(size, int) else 0


def _joined(value: ir.Value) -> ir.Value | None:
    """The output of an attention with its heads joined, `[batch, length, heads * size]`; `None` for other readers."""
    for operator in ("Transpose", "Reshape"):
        uses = tuple(value.uses())
        node = uses[0].node if len(uses) == 1 else None
        if node is None or node.op_type != operator or not _swaps_heads(node, "Transpose"):
            return None
        value = node.outputs[0]
    return value if value.shape is not None and len(value.shape) == 3 else None


def _swaps_heads(node: ir.Node, operator: str) -> bool:
    return node.op_type != operator or tuple(node.attributes.get_ints("perm", ())) == _SWAP_LENGTH_AND_HEADS


def _can_flatten(value: ir.Value | None) -> bool:
    """Whether `_flat` can undo the split of heads: by a `Transpose`, or by one before a `RotaryEmbedding`."""
    node = value.producer() if value is not None else None
    if node is not None and node.op_type == "RotaryEmbedding" and len(node.inputs) == 3:
        return _can_flatten(node.inputs[0])
    return node is not None and node.op_type == "Transpose" and _swaps_heads(node, "Transpose")


def _flat(graph: ir.Graph, value: ir.Value | None, heads: int) -> ir.Value:
    """A value `[batch, heads, length, size]` in the form `[batch, length, heads * size]`."""
    assert value is not None
    node = value.producer()
    assert node is not None
    if node.op_type == "RotaryEmbedding":
        new_node = _node(node, [_flat(graph, node.inputs[0], heads), *node.inputs[1:]], outputs=1)
        new_node.attributes["num_heads"] = ir.AttrInt64("num_heads", heads)
    else:
        split = node.inputs[0]
        reshape = split.producer() if split is not None else None
        unsplit = reshape.inputs[0] if reshape is not None and reshape.op_type == "Reshape" else None
        if unsplit is not None and unsplit.shape is not None and len(unsplit.shape) == 3:
            return unsplit
        shape = initializer(graph, ir.tensor(np.array([0, 0, -1]), name="side_by_side"))
        new_node = ir.node("Reshape", [split, shape], metadata_props=dict(node.metadata_props))
        new_node.outputs[0].type = value.type
    graph.insert_before(node, new_node)
    return new_node.outputs[0]


def _node(like: ir.Node, inputs: list[ir.Value | None], outputs: int) -> ir.Node:
    """A copy of the node `like` with other inputs and another number of outputs."""
    new_node = ir.Node(
        like.domain,
        like.op_type,
        inputs,
        like.attributes.values(),
        num_outputs=outputs,
        version=like.version,
        metadata_props=dict(like.metadata_props),
    )
    for value in new_node.outputs:
        value.type = like.outputs[0].type
    return new_node
