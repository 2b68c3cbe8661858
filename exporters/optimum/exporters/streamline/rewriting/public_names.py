"""The names a client sees: inputs, outputs and axes as optimum, ONNX Runtime GenAI and transformers.js expect them.

    input_ids, attention_mask, position_ids, past_key_values.N.key/value -> logits, present.N.key/value

A graph with caches of a fixed length has `write_indices` and `mask`, or `mask.window_N`, in place of `attention_mask`.
One value within has a name that is relied on, `last_hidden_state`: what the output projection reads. Knows no model: N
counts the cache entries the graph has, in order, whichever layers they belong to.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable
from dataclasses import dataclass

import onnx_ir as ir

from optimum.streamline.errors import StreamlineError

from .edits import PRODUCTS

BATCH, SEQUENCE, PAST, TOTAL = "batch_size", "sequence_length", "past_sequence_length", "total_sequence_length"
LAST_HIDDEN_STATE = "last_hidden_state"
TOKEN_INPUTS = ("input_ids", "attention_mask", "position_ids")
TRACED_CACHE = re.compile(r"(?:(?:in|out)put\.)?past_key_values\.layers\.(\d+)\.(key|value)s")
_SCOPES = "pkg.torch.onnx.name_scopes"
_NO_MODULE = "_empty_nn_module_stack_from_metadata_hook"

_AXES = {
    "input_ids": (BATCH, SEQUENCE),
    "attention_mask": (BATCH, TOTAL),
    "position_ids": (BATCH, SEQUENCE),
    "write_indices": (BATCH,),
    "mask": (BATCH, None, SEQUENCE, None),
    "logits": (BATCH, SEQUENCE, None),
    "past_key_values": (BATCH, None, PAST, None),
    "present": (BATCH, None, TOTAL, None),
}


def rename(model: ir.Model, tokens: Iterable[str] = TOKEN_INPUTS) -> None:
    """Give inputs, outputs, their axes, and the nodes their public names, in place.

    Args:
        tokens: The inputs that there must be beside the caches.

    Raises:
        StreamlineError: the graph lacks an input that clients feed, or has one that they do not know.
    """
    graph = model.graph
    missing = sorted(set(tokens) - {str(value.name) for value in graph.inputs})
    if missing:
        raise StreamlineError(f"architecture cannot be exported: its graph does not read {', '.join(missing)}")
    _rename_cache(list(graph.inputs), "past_key_values")
    _rename_cache(list(graph.outputs), "present")
    _forget_inner_shapes(graph)
    _name_last_hidden_state(graph)
    for value in (*graph.inputs, *graph.outputs):
        _rename_axes(value)
    _name_nodes(graph)


def scopes(node: ir.Node) -> list[str]:
    """The modules a traced node came from, outermost first, and last the torch operator; none where that was lost."""
    found: list[str] = ast.literal_eval(node.metadata_props.get(_SCOPES, "[]"))
    return found


def set_scopes(node: ir.Node, found: list[str]) -> None:
    """Say where a node came from, as `scopes` tells it."""
    node.metadata_props[_SCOPES] = repr(found)


def cache_inputs(model: ir.Model) -> list[ir.Value]:
    """The inputs that hold keys and values, each `[batch, heads, past, head size]`, of a renamed graph."""
    return [value for value in model.graph.inputs if str(value.name).startswith("past_key_values.")]


def _rename_cache(values: list[ir.Value], prefix: str) -> None:
    found = [(match, value) for value in values if (match := TRACED_CACHE.fullmatch(str(value.name)))]
    entries = sorted({int(match[1]) for match, _ in found})
    for match, value in found:
        value.name = f"{prefix}.{entries.index(int(match[1]))}.{match[2]}"


def _rename_axes(value: ir.Value) -> None:
    kind = str(value.name).split(".")[0]
    if kind not in _AXES or value.shape is None:
        raise StreamlineError(f"architecture cannot be exported: its graph has the input or output {value.name!r}")
    named = zip(_AXES[kind], value.shape, strict=True)
    value.shape = ir.Shape([_axis(name, size) for name, size in named])


def _axis(name: str | None, size: int | ir.SymbolicDim) -> int | str:
    # The tracer writes a fixed size as a symbol too, "2", which TensorRT and GenAI read as a name.
    return size if isinstance(size, int) else name or int(str(size))


def _forget_inner_shapes(graph: ir.Graph) -> None:
    # They are written in the tracer's symbols, which mean nothing once the axes have their names.
    for node in graph:
        for output in node.outputs:
            if not output.is_graph_output():
                output.shape = None


def _name_last_hidden_state(graph: ir.Graph) -> None:
    # Behind the output projection is at most what scales or caps logits, of one input and constants.
    [node] = [value.producer() for value in graph.outputs if value.name == "logits"]
    while node is not None and node.op_type not in PRODUCTS:
        node = node.inputs[0].producer() if node.inputs[0] is not None else None
    if node is not None and node.inputs[0] is not None:
        node.inputs[0].name = LAST_HIDDEN_STATE


def _name_nodes(graph: ir.Graph) -> None:
    """Name nodes by the module they came from, `model.layers.3.mlp.up_proj/MatMul`, for profiles and exclusions."""
    taken: dict[str, int] = {}
    for node in graph:
        modules = scopes(node)[:-1]
        name = f"{modules[-1] if modules and modules[-1] != _NO_MODULE else ''}/{node.op_type}"
        taken[name] = taken.get(name, 0) + 1
        node.name = name if taken[name] == 1 else f"{name}_{taken[name]}"
        node.metadata_props.clear()
    graph.metadata_props.clear()  # the tracer's account of the few layers it saw


@dataclass(frozen=True)
class MaskInput:
    """An input of a static graph that says which places of the caches a token attends to.

    Args:
        name: Of the input, `[batch, 1, length, cache length]`, which is added to attention scores: 0 for a place that
            is attended to, and half the least number of its type for one that is not.
        window: How many places a token attends to at most, its own the last of them; `None` where it is all.
    """

    name: str
    window: int | None = None
