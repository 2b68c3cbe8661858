"""Letting `Attention` do what the tracer writes out around it: repeat heads, append to the cache, take heads apart.

Each step leaves a node as it is where its surroundings are not those that the step knows. Runs while the tracer's
shapes are still on the values. Knows no architecture.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from .edits import initializer, take_over
from .public_names import TRACED_CACHE

_HEADS_APART = (0, 2, 1, 3)  # between [batch, length, heads, size] and [batch, heads, length, size]
QUERY, KEY, VALUE, MASK = range(4)


def simplify_attention(model: ir.Model) -> None:
    """Give `Attention` grouped heads, and leave what padding attends to as it is, in place."""
    _take_steps(model, _share_heads, _keep_masked_rows)


def append_within_attention(model: ir.Model) -> None:
    """Give `Attention` the cache, to append to, and heads side by side, in place."""
    _take_steps(model, _append_to_cache, _flatten_heads)


def _take_steps(model: ir.Model, *steps: Callable[[ir.Graph, ir.Node], None]) -> None:
    for step in steps:
        for node in list(model.graph):
            if node.op_type == "Attention" and len(node.inputs) > MASK:
                step(model.graph, node)
        RemoveUnusedNodesPass()(model)  # or what is no longer needed would seem to be read


def _share_heads(graph: ir.Graph, attention: ir.Node) -> None:
    """Read keys and values once for all heads that share them, not a copy for each."""
    shared = [_before_repetition(attention.inputs[place]) for place in (KEY, VALUE)]
    if all(shared):
        for place, value in zip((KEY, VALUE), shared, strict=True):
            attention.replace_input_with(place, value)


def _before_repetition(value: ir.Value | None) -> ir.Value | None:
    """The `[batch, heads, length, size]` of which each head was repeated some times in a row."""
    for operator in ("Reshape", "Expand", "Unsqueeze"):
        node = value.producer() if value is not None else None
        if node is None or node.op_type != operator:
            return None
        value = node.inputs[0]
        axes = node.inputs[1]
    repeated = axes is not None and axes.const_value is not None and axes.const_value.numpy().tolist() == [2]
    return value if repeated and value is not None and value.shape is not None and len(value.shape) == 4 else None


def _keep_masked_rows(graph: ir.Graph, attention: ir.Node) -> None:
    """Do not set to zero what padding attends to, which nobody reads; but see that it is a number.

    A row that masks every key has all its scores at the least number there is, where half precision overflows as soon
    as anything is added: half of it masks as well, and leaves room.
    """
    mask, (zeroed,) = attention.inputs[MASK], attention.outputs
    wheres = [use.node for use in zeroed.uses()]
    scale = mask.producer() if mask is not None else None
    if len(wheres) != 1 or wheres[0].op_type != "Where" or wheres[0].inputs[2] is not zeroed or scale is None:
        return
    least = scale.inputs[1] if scale.op_type == "Mul" else None
    if least is None or least.const_value is None or least.dtype is None or not _is_zero(wheres[0].inputs[1]):
        return
    lowest = float(least.dtype.min)
    found = least.const_value.numpy()
    if found.size == 1 and found.item() in (lowest, lowest / 2):
        name = f"half_of_least_{least.dtype.name.lower()}"
        half = initializer(graph, ir.tensor(np.array(lowest / 2, found.dtype), name=name))
        scale.replace_input_with(1, half)
        wheres[0].outputs[0].replace_all_uses_with(zeroed)


def _is_zero(value: ir.Value | None) -> bool:
    return value is not None and value.const_value is not None and not value.const_value.numpy().any()


def _append_to_cache(graph: ir.Graph, attention: ir.Node) -> None:
    """Let the node append keys and values to the cache."""
    query, mask = attention.inputs[QUERY], attention.inputs[MASK]
    appended = [_appended(attention.inputs[place]) for place in (KEY, VALUE)]
    if not all(appended):
        return
    (past_key, key), (past_value, value) = (each for each in appended if each is not None)
    made = _node(attention, [query, key, value, mask, past_key, past_value], outputs=3)
    graph.insert_before(attention, made)
    for old, new in zip((attention.outputs[0], *attention.inputs[KEY:MASK]), made.outputs, strict=True):
        assert old is not None
        take_over(old, new)


def _appended(value: ir.Value | None) -> tuple[ir.Value, ir.Value] | None:
    """The cache entry and what was appended to it, if the node that did is read by nobody else."""
    node = value.producer() if value is not None else None
    if node is None or node.op_type != "Concat" or len(node.inputs) != 2 or len(node.outputs[0].uses()) != 1:
        return None
    past, new = node.inputs
    along = node.attributes.get_int("axis", 0)
    if past is None or new is None or along not in (-2, 2) or not node.outputs[0].is_graph_output():
        return None
    return (past, new) if past.is_graph_input() and TRACED_CACHE.fullmatch(str(past.name)) else None


def _flatten_heads(graph: ir.Graph, attention: ir.Node) -> None:
    """Give queries, keys and values as `[batch, length, heads * size]`, as projections make them, and take such."""
    heads = [_heads(attention.inputs[place]) for place in (QUERY, KEY, VALUE)]
    joined = _joined(attention.outputs[0])
    if joined is None or not all(heads) or not all(map(_can_flatten, attention.inputs[QUERY:MASK])):
        return
    flat = [_flat(graph, attention.inputs[place], heads[place]) for place in (QUERY, KEY, VALUE)]
    made = _node(attention, [*flat, *attention.inputs[MASK:]], outputs=len(attention.outputs))
    made.attributes["q_num_heads"] = ir.AttrInt64("q_num_heads", heads[QUERY])
    made.attributes["kv_num_heads"] = ir.AttrInt64("kv_num_heads", heads[KEY])
    graph.insert_before(attention, made)
    take_over(joined, made.outputs[0])
    for old, new in zip(attention.outputs[1:], made.outputs[1:], strict=True):
        take_over(old, new)


def _heads(value: ir.Value | None) -> int:
    """The number of heads of a `[batch, heads, length, size]`; 0 where it is not known."""
    size = value.shape[1] if value is not None and value.shape is not None and len(value.shape) == 4 else None
    return size if isinstance(size, int) else 0


def _joined(value: ir.Value) -> ir.Value | None:
    """What becomes of an attention's output when its heads are put side by side, if nothing else does."""
    for operator in ("Transpose", "Reshape"):
        uses = tuple(value.uses())
        node = uses[0].node if len(uses) == 1 else None
        if node is None or node.op_type != operator or not _swaps_heads(node, "Transpose"):
            return None
        value = node.outputs[0]
    return value if value.shape is not None and len(value.shape) == 3 else None


def _swaps_heads(node: ir.Node, operator: str) -> bool:
    return node.op_type != operator or tuple(node.attributes.get_ints("perm", ())) == _HEADS_APART


def _can_flatten(value: ir.Value | None) -> bool:
    node = value.producer() if value is not None else None
    if node is not None and node.op_type == "RotaryEmbedding" and len(node.inputs) == 3:
        return _can_flatten(node.inputs[0])
    return node is not None and node.op_type == "Transpose" and _swaps_heads(node, "Transpose")


def _flat(graph: ir.Graph, value: ir.Value | None, heads: int) -> ir.Value:
    """`[batch, heads, length, size]` as `[batch, length, heads * size]`."""
    assert value is not None
    node = value.producer()
    assert node is not None
    if node.op_type == "RotaryEmbedding":
        made = _node(node, [_flat(graph, node.inputs[0], heads), *node.inputs[1:]], outputs=1)
        made.attributes["num_heads"] = ir.AttrInt64("num_heads", heads)
    else:
        apart = node.inputs[0]
        source = apart.producer() if apart is not None else None
        whole = source.inputs[0] if source is not None and source.op_type == "Reshape" else None
        if whole is not None and whole.shape is not None and len(whole.shape) == 3:
            return whole
        shape = initializer(graph, ir.tensor(np.array([0, 0, -1]), name="side_by_side"))
        made = ir.node("Reshape", [apart, shape], metadata_props=dict(node.metadata_props))
        made.outputs[0].type = value.type
    graph.insert_before(node, made)
    return made.outputs[0]


def _node(like: ir.Node, inputs: list[ir.Value | None], outputs: int) -> ir.Node:
    """A node as `like`, but for what it reads and how much it makes."""
    made = ir.Node(
        like.domain,
        like.op_type,
        inputs,
        like.attributes.values(),
        num_outputs=outputs,
        version=like.version,
        metadata_props=dict(like.metadata_props),
    )
    for value in made.outputs:
        value.type = like.outputs[0].type
    return made
