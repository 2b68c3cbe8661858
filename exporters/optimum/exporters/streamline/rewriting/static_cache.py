"""Give a traced graph static caches and mask inputs, the form that a TensorRT engine needs.

`Concat(past, new)` becomes `TensorScatter(past, new, write_indices)`, whose output can share memory with its input.
The nodes that computed masks from `attention_mask` are removed. In their place the graph gets one input per kind of
mask, full attention or a sliding window, and the runner fills it. The code works for every architecture. It needs the
tracer's names, so it runs before `public_names.set_public_names`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator
from onnx_ir.convenience import extract
from onnx_ir.passes.common import RemoveUnusedNodesPass

from optimum.streamline.errors import StreamlineError

from .graph_helpers import initializer, replace_value
from .public_names import TOKEN_INPUTS, TRACED_CACHE, MaskInput

OPSET = 24
"""The first opset with `TensorScatter`."""

INPUT_IDS, ATTENTION_MASK, POSITION_IDS = TOKEN_INPUTS
WRITE_INDICES, MASK = "write_indices", "mask"
STATIC_INPUTS = (INPUT_IDS, POSITION_IDS, WRITE_INDICES)
"""The inputs of a graph with static caches, besides masks and caches."""


def use_static_caches(model: ir.Model, length: int) -> tuple[MaskInput, ...]:
    """Give a traced graph static caches and mask inputs, in place.

    Args:
        model: The traced graph, with the tracer's names.
        length: The length of the caches, in tokens.

    Returns:
        The mask inputs.

    Raises:
        StreamlineError: the graph changes its caches otherwise than by appending, or its masks are not added to
            attention scores or have another pattern than full attention or a sliding window.
    """
    graph = model.graph
    _read_batch_of_tokens(graph)
    masks = _replace_masks(graph, length)
    write_indices = ir.val(WRITE_INDICES, ir.DataType.INT64, [None])
    graph.inputs.append(write_indices)
    _set_past_length(graph, length)
    for node in list(graph):
        if node.op_type == "Concat" and _is_cache(node.inputs[0]) and node.outputs[0].is_graph_output():
            _write_in_place(graph, node, write_indices, length)
    RemoveUnusedNodesPass()(model)
    _refuse_other_uses(graph)
    graph.opset_imports[""] = OPSET
    return masks


def _is_cache(value: ir.Value | None) -> bool:
    return value is not None and value.is_graph_input() and TRACED_CACHE.fullmatch(str(value.name)) is not None


def _write_in_place(graph: ir.Graph, concat: ir.Node, write_indices: ir.Value, length: int) -> None:
    past, new = concat.inputs
    assert past is not None
    assert past.shape is not None
    past.shape = ir.Shape([past.shape[0], past.shape[1], length, past.shape[3]])
    scatter = ir.node(
        "TensorScatter", [past, new, write_indices], {"axis": -2}, metadata_props=dict(concat.metadata_props)
    )
    graph.insert_before(concat, scatter)
    replace_value(concat.outputs[0], scatter.outputs[0])
    scatter.outputs[0].shape = past.shape


def _set_past_length(graph: ir.Graph, length: int) -> None:
    """Compute each past length as `length` minus the number of new tokens.

    The graph read it from the size of a growing cache, to get the total length of past and new tokens. With a static
    cache that total is `length`.
    """
    counts = [node for node in graph if node.op_type == "Shape" and _is_cache(node.inputs[0]) and _axis(node) == 2]
    if not counts:
        return
    tokens = next(value for value in graph.inputs if value.name == INPUT_IDS)
    whole = initializer(graph, ir.tensor(np.array([length]), name="cache_length"))
    new = ir.node("Shape", [tokens], {"start": 1, "end": 2})
    past = ir.node("Sub", [whole, new.outputs[0]])
    for made in (new, past):
        made.outputs[0].shape, made.outputs[0].dtype = ir.Shape([1]), ir.DataType.INT64
    graph.insert_before(graph[0], [new, past])
    for count in counts:
        count.outputs[0].replace_all_uses_with(past.outputs[0])


def _axis(shape: ir.Node) -> int | None:
    """The axis whose size a `Shape` node reads; `None` if it reads several."""
    start = shape.attributes.get_int("start", 0)
    return start if shape.attributes.get_int("end", None) == start + 1 else None


def _read_batch_of_tokens(graph: ir.Graph) -> None:
    """Make the nodes that read the batch size from the mask read it from `input_ids`."""
    tokens = next(value for value in graph.inputs if value.name == INPUT_IDS)
    for node in graph:
        reads_mask = node.op_type == "Shape" and node.inputs[0] is not None and node.inputs[0].name == ATTENTION_MASK
        if reads_mask and _axis(node) == 0:
            node.replace_input_with(0, tokens)


def _replace_masks(graph: ir.Graph, length: int) -> tuple[MaskInput, ...]:
    """Replace each mask that attention reads by a graph input; masks with the same window become one input."""
    mask_nodes = _mask_nodes(graph)
    masks = [value for node in graph if node in mask_nodes for value in node.outputs if _leaves(value, mask_nodes)]
    if not masks:
        raise StreamlineError("architecture cannot be exported to TensorRT: nothing in its graph reads a mask")
    inputs: dict[int | None, ir.Value] = {}
    for value, window in zip(masks, _windows(graph, masks, length), strict=True):
        if window not in inputs:
            name = MASK if window is None else f"{MASK}.window_{window}"
            shape = ir.Shape([None, 1, None, length])
            inputs[window] = ir.val(name, _float_type(value), shape)
            graph.inputs.append(inputs[window])
        value.replace_all_uses_with(inputs[window])
    return tuple(MaskInput(str(value.name), window) for window, value in inputs.items())


def _mask_nodes(graph: ir.Graph) -> set[ir.Node]:
    """The nodes that compute masks: they read `attention_mask` or its results, and otherwise constants and shapes."""
    mask_nodes: set[ir.Node] = set()
    independent: set[ir.Value] = set()  # values that depend on constants and shapes alone
    for node in graph:
        inputs = [value for value in node.inputs if value is not None]
        if node.op_type == "Shape" or all(_is_constant(value) or value in independent for value in inputs):
            independent.update(node.outputs)
        elif all(_is_constant(each) or each in independent or _is_masked(each, mask_nodes) for each in inputs):
            mask_nodes.add(node)
    return mask_nodes


def _is_constant(value: ir.Value) -> bool:
    return value.const_value is not None


def _is_masked(value: ir.Value, mask_nodes: set[ir.Node]) -> bool:
    return value.name == ATTENTION_MASK or value.producer() in mask_nodes


def _leaves(value: ir.Value, mask_nodes: set[ir.Node]) -> bool:
    """Whether a node other than the mask nodes reads the value itself, not only its shape."""
    return any(use.node not in mask_nodes and use.node.op_type != "Shape" for use in value.uses())


def _float_type(value: ir.Value) -> ir.DataType:
    if value.shape is None or len(value.shape) != 4 or value.dtype is None or not value.dtype.is_floating_point():
        raise StreamlineError(
            f"architecture cannot be exported to TensorRT: it computes {value.name!r} ({value.dtype} {value.shape}) "
            "from its mask; only masks that are added to attention scores are supported"
        )
    return value.dtype


def _windows(graph: ir.Graph, masks: list[ir.Value], length: int) -> list[int | None]:
    """The sliding window of each mask in tokens, `None` for full attention.

    Each mask is computed for the last of `length` tokens, and the positions that it leaves open are counted.
    """
    inputs = [value for value in graph.inputs if value.name in TOKEN_INPUTS or _is_cache(value)]
    mask_model = ir.Model(extract(graph, inputs, masks), ir_version=10)
    mask_model.graph.opset_imports.update(graph.opset_imports)
    arrays = {str(value.name): _sample_input(value, length) for value in inputs}
    rows = ReferenceEvaluator(ir.to_proto(mask_model)).run(None, arrays)
    return [_window(np.asarray(row, np.float64).reshape(-1)) for row in rows]


def _sample_input(value: ir.Value, length: int) -> npt.NDArray[Any]:
    """The value of an input for one new token after `length - 1` past tokens."""
    if not _is_cache(value):
        return np.ones((1, length if value.name == ATTENTION_MASK else 1), np.int64)
    assert value.shape is not None
    _, heads, _, size = value.shape
    return np.zeros((1, int(str(heads)), length - 1, int(str(size))), np.float32)


def _window(row: npt.NDArray[np.float64]) -> int | None:
    attended = int((row == 0).sum())
    if not attended or row[-attended:].any():
        raise StreamlineError(
            f"architecture cannot be exported to TensorRT: its last token attends to {attended} of {row.size} "
            "positions that are not the last ones; only full attention and sliding windows are supported"
        )
    return None if attended == row.size else attended


def _refuse_other_uses(graph: ir.Graph) -> None:
    """Remove the input `attention_mask`; refuse a graph that still reads it, or changes a cache in another way."""
    [mask] = [value for value in graph.inputs if value.name == ATTENTION_MASK]
    if mask.uses():
        readers = ", ".join(sorted({use.node.op_type for use in mask.uses()}))
        raise StreamlineError(f"architecture cannot be exported to TensorRT: its {ATTENTION_MASK} is read by {readers}")
    graph.inputs.remove(mask)
    for value in graph.outputs:
        node = value.producer()
        if TRACED_CACHE.fullmatch(str(value.name)) and (node is None or node.op_type != "TensorScatter"):
            raise StreamlineError(
                f"architecture cannot be exported to TensorRT: the cache {value.name} must be appended to, it is made "
                f"by {node.op_type if node else 'nothing'}"
            )
