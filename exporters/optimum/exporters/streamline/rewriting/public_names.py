"""Set the graph's public names, which optimum, ONNX Runtime GenAI and transformers.js expect.

    input_ids, attention_mask, position_ids, past_key_values.N.key/value -> logits, present.N.key/value

A graph with static caches has the inputs `write_indices` and `mask` (or `mask.window_N`) in place of `attention_mask`.
N counts the graph's cache entries from 0. It is no layer index, because a layer without attention has no cache entry.
One inner value has a fixed name too: `last_hidden_state`, the input of the output projection.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable
from dataclasses import dataclass

import onnx_ir as ir

from optimum.streamline.errors import StreamlineError

from .graph_helpers import MATMUL_OPERATORS

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


def set_public_names(model: ir.Model, tokens: Iterable[str] = TOKEN_INPUTS) -> None:
    """Rename the graph's inputs, outputs, axes and nodes, in place.

    Args:
        model: The traced graph, with the tracer's names.
        tokens: The inputs, besides masks and caches, that the graph must have.

    Raises:
        StreamlineError: the graph lacks one of `tokens`, or has an input or output that clients do not know.
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
    """The names of the modules that a traced node came from, outermost first; the last is the torch operator.

    Empty for a node whose origin an optimization dropped.
    """
    names: list[str] = ast.literal_eval(node.metadata_props.get(_SCOPES, "[]"))
    return names


def set_scopes(node: ir.Node, names: list[str]) -> None:
    """Record the modules that a node came from, in the form that `scopes` returns."""
    node.metadata_props[_SCOPES] = repr(names)


def cache_inputs(model: ir.Model) -> list[ir.Value]:
    """The cache inputs of a graph with public names, each `[batch, heads, past length, head size]`."""
    return [value for value in model.graph.inputs if str(value.name).startswith("past_key_values.")]


def _rename_cache(values: list[ir.Value], prefix: str) -> None:
    caches = [(match, value) for value in values if (match := TRACED_CACHE.fullmatch(str(value.name)))]
    entries = sorted({int(match[1]) for match, _ in caches})
    for match, value in caches:
        value.name = f"{prefix}.{entries.index(int(match[1]))}.{match[2]}"


def _rename_axes(value: ir.Value) -> None:
    kind = str(value.name).split(".")[0]
    if kind not in _AXES or value.shape is None:
        raise StreamlineError(f"architecture cannot be exported: its graph has the input or output {value.name!r}")
    named = zip(_AXES[kind], value.shape, strict=True)
    value.shape = ir.Shape([_axis(name, size) for name, size in named])


def _axis(name: str | None, size: int | ir.SymbolicDim) -> int | str:
    # The tracer writes a fixed size as a symbol, "2", which TensorRT and GenAI would take for the name of an axis.
    return size if isinstance(size, int) else name or int(str(size))


def _forget_inner_shapes(graph: ir.Graph) -> None:
    # They use the tracer's symbols, which no longer match the names of the input and output axes.
    for node in graph:
        for output in node.outputs:
            if not output.is_graph_output():
                output.shape = None


def _name_last_hidden_state(graph: ir.Graph) -> None:
    # After the output projection there are at most nodes that scale or cap logits; they have one input and constants.
    [node] = [value.producer() for value in graph.outputs if value.name == "logits"]
    while node is not None and node.op_type not in MATMUL_OPERATORS:
        node = node.inputs[0].producer() if node.inputs[0] is not None else None
    if node is not None and node.inputs[0] is not None:
        node.inputs[0].name = LAST_HIDDEN_STATE


def _name_nodes(graph: ir.Graph) -> None:
    """Name each node by module and operator, such as `model.layers.3.mlp.up_proj/MatMul`.

    Profilers show these names, and `excluded_nodes.py` reads them.
    """
    count: dict[str, int] = {}
    for node in graph:
        modules = scopes(node)[:-1]
        name = f"{modules[-1] if modules and modules[-1] != _NO_MODULE else ''}/{node.op_type}"
        count[name] = count.get(name, 0) + 1
        node.name = name if count[name] == 1 else f"{name}_{count[name]}"
        node.metadata_props.clear()
    graph.metadata_props.clear()  # the tracer's notes, which describe the few traced layers only


@dataclass(frozen=True)
class MaskInput:
    """An attention-mask input of a graph with static caches.

    The input has the shape `[batch, 1, new tokens, cache length]` and is added to the attention scores: 0 for a cache
    position that the token attends to, and half the lowest number of its type for any other.

    Args:
        name: The name of the input.
        window: The sliding window in tokens, the token itself included; `None` for full attention.
    """

    name: str
    window: int | None = None
