"""The form of a graph that TensorRT takes: caches of a fixed length that are written in place, and masks from outside.

`Concat(past, new)` becomes `TensorScatter(past, new, write_indices)`, whose output may lie where its input does, and
what the tracer made of `attention_mask` becomes an input for each kind of mask, which the runner fills. Runs while the
tracer's names are still on the values. Knows no architecture.
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

from .edits import initializer, take_over
from .public_names import TOKEN_INPUTS, TRACED_CACHE, MaskInput

OPSET = 24
"""The first with `TensorScatter`."""

INPUT_IDS, ATTENTION_MASK, POSITION_IDS = TOKEN_INPUTS
WRITE_INDICES, MASK = "write_indices", "mask"
STATIC_INPUTS = (INPUT_IDS, POSITION_IDS, WRITE_INDICES)
"""What is fed beside masks and caches."""


def use_static_caches(model: ir.Model, length: int) -> tuple[MaskInput, ...]:
    """Give a traced graph caches of `length` places, and masks as inputs, in place.

    Raises:
        StreamlineError: the graph does not append to its caches, or makes something else of its masks.
    """
    graph = model.graph
    _read_batch_of_tokens(graph)
    masks = _open_masks(graph, length)
    write_indices = ir.val(WRITE_INDICES, ir.DataType.INT64, [None])
    graph.inputs.append(write_indices)
    _count_from_the_end(graph, length)
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
    made = ir.node(
        "TensorScatter", [past, new, write_indices], {"axis": -2}, metadata_props=dict(concat.metadata_props)
    )
    graph.insert_before(concat, made)
    take_over(concat.outputs[0], made.outputs[0])
    made.outputs[0].shape = past.shape


def _count_from_the_end(graph: ir.Graph, length: int) -> None:
    """Let past tokens be so many that with the new ones they are `length`: all that is asked of them is that sum."""
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
    """The one axis whose size a node reads, if it is one."""
    start = shape.attributes.get_int("start", 0)
    return start if shape.attributes.get_int("end", None) == start + 1 else None


def _read_batch_of_tokens(graph: ir.Graph) -> None:
    """Read the batch size off `input_ids`, where it is read off the mask."""
    tokens = next(value for value in graph.inputs if value.name == INPUT_IDS)
    for node in graph:
        of_the_mask = node.op_type == "Shape" and node.inputs[0] is not None and node.inputs[0].name == ATTENTION_MASK
        if of_the_mask and _axis(node) == 0:
            node.replace_input_with(0, tokens)


def _open_masks(graph: ir.Graph, length: int) -> tuple[MaskInput, ...]:
    """Make inputs of what attention reads of masks; those that mask alike become one."""
    inner = _made_of_masks(graph)
    read = [value for node in graph if node in inner for value in node.outputs if _leaves(value, inner)]
    if not read:
        raise StreamlineError("architecture cannot be exported to TensorRT: nothing in its graph reads a mask")
    found: dict[int | None, ir.Value] = {}
    for value, window in zip(read, _windows(graph, read, length), strict=True):
        if window not in found:
            name = MASK if window is None else f"{MASK}.window_{window}"
            shape = ir.Shape([None, 1, None, length])
            found[window] = ir.val(name, _float_type(value), shape)
            graph.inputs.append(found[window])
        value.replace_all_uses_with(found[window])
    return tuple(MaskInput(str(value.name), window) for window, value in found.items())


def _made_of_masks(graph: ir.Graph) -> set[ir.Node]:
    """The nodes that make something of `attention_mask`, and of nothing but it, constants, and shapes."""
    inner: set[ir.Node] = set()
    plain: set[ir.Value] = set()
    for node in graph:
        given = [value for value in node.inputs if value is not None]
        if node.op_type == "Shape" or all(_is_constant(value) or value in plain for value in given):
            plain.update(node.outputs)
        elif all(_is_constant(value) or value in plain or _is_masked(value, inner) for value in given):
            inner.add(node)
    return inner


def _is_constant(value: ir.Value) -> bool:
    return value.const_value is not None


def _is_masked(value: ir.Value, inner: set[ir.Node]) -> bool:
    return value.name == ATTENTION_MASK or value.producer() in inner


def _leaves(value: ir.Value, inner: set[ir.Node]) -> bool:
    return any(use.node not in inner and use.node.op_type != "Shape" for use in value.uses())


def _float_type(value: ir.Value) -> ir.DataType:
    if value.shape is None or len(value.shape) != 4 or value.dtype is None or not value.dtype.is_floating_point():
        raise StreamlineError(
            f"architecture cannot be exported to TensorRT: of its mask it makes {value.name!r}, {value.dtype} "
            f"{value.shape}, where an addend to attention scores is known"
        )
    return value.dtype


def _windows(graph: ir.Graph, masks: list[ir.Value], length: int) -> list[int | None]:
    """How many places the last of `length` tokens attends to, by mask: the mask is computed, and looked at."""
    inputs = [value for value in graph.inputs if value.name in TOKEN_INPUTS or _is_cache(value)]
    asked = ir.Model(extract(graph, inputs, masks), ir_version=10)
    asked.graph.opset_imports.update(graph.opset_imports)
    rows = ReferenceEvaluator(ir.to_proto(asked)).run(None, {str(value.name): _fed(value, length) for value in inputs})
    return [_window(np.asarray(row, np.float64).reshape(-1)) for row in rows]


def _fed(value: ir.Value, length: int) -> npt.NDArray[Any]:
    """One token behind `length` less one others."""
    if not _is_cache(value):
        return np.ones((1, length if value.name == ATTENTION_MASK else 1), np.int64)
    assert value.shape is not None
    _, heads, _, size = value.shape
    return np.zeros((1, int(str(heads)), length - 1, int(str(size))), np.float32)


def _window(row: npt.NDArray[np.float64]) -> int | None:
    open_places = int((row == 0).sum())
    if not open_places or row[-open_places:].any():
        raise StreamlineError(
            f"architecture cannot be exported to TensorRT: a token attends to {open_places} of {row.size} places that "
            f"are not the last ones"
        )
    return None if open_places == row.size else open_places


def _refuse_other_uses(graph: ir.Graph) -> None:
    """Nothing may read the mask that was there before, nor lengths of caches that no longer grow."""
    [mask] = [value for value in graph.inputs if value.name == ATTENTION_MASK]
    if mask.uses():
        readers = ", ".join(sorted({use.node.op_type for use in mask.uses()}))
        raise StreamlineError(f"architecture cannot be exported to TensorRT: its {ATTENTION_MASK} is read by {readers}")
    graph.inputs.remove(mask)
    for value in graph.outputs:
        node = value.producer()
        if TRACED_CACHE.fullmatch(str(value.name)) and (node is None or node.op_type != "TensorScatter"):
            raise StreamlineError(
                f"architecture cannot be exported to TensorRT: {value.name} is not appended to, but made by "
                f"{node.op_type if node else 'nothing'}"
            )
