"""Apply a quantizer of ONNX Runtime to a graph a few layers at a time, for a model that does not fit in memory.

These quantizers hold all weights of the graph that they get. They decide about each matmul by its weight and by what it
reads in the float graph. So segments that are quantized one by one compute what the whole would compute.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx_ir.convenience import replace_all_uses_with

from optimum.exporters.streamline.graph_files import GRAPH_FILE, WEIGHTS_FILE
from optimum.exporters.streamline.onnx.runner import open_session
from optimum.exporters.streamline.onnx.segments import segments_of

from .calibration_inputs import InputArrays, calibration_inputs
from .settings import Quantization

Quantizer = Callable[[Path, Path, Iterator[InputArrays]], None]
"""A function that quantizes the graph in one file into another file, with the inputs of the calibration calls."""

SEGMENT = 2**26
"""The most bytes of weights that a quantizer gets at once, unless one layer has more, or the first one with the
embedding."""


def quantize_in_segments(model: ir.Model, quantization: Quantization, scratch: Path, quantizer: Quantizer) -> ir.Model:
    """Quantize a graph, in segments of at most `SEGMENT` bytes if it can be cut.

    Args:
        model: The float32 graph, with public names.
        quantization: The calibration text, and how the graph may be cut.
        scratch: An empty folder for the parts. The result reads its weights from there.
        quantizer: The function that quantizes.

    Returns:
        The quantized graph.
    """
    text = quantization.windows
    held = [] if text is None else list(calibration_inputs(model.graph, text.ids.numpy()))
    if not quantization.hidden:
        result = _quantized(model, held, scratch / "whole", quantizer)
        _delete_files(scratch / "whole")
        return result
    segments, parts = segments_of(model.graph, quantization.hidden, SEGMENT), list[ir.Model]()
    for index, segment in enumerate(segments):
        part, folder = segment.cut_from(model), scratch / str(index)
        parts.append(_quantized(part, held, folder, quantizer))
        read_later = {name for later in segments[index + 1 :] for name in later.inputs}
        if held and read_later:
            _advance(folder / GRAPH_FILE, [name for name in segment.outputs if name in read_later], held)
        for values in held:
            for name in values.keys() - read_later:
                del values[name]
        _delete_files(folder)
    return _joined(model, parts)


def _delete_files(folder: Path) -> None:
    """Delete what a quantizer read and left in the folder, but not what it wrote into the folder in it."""
    for file in folder.iterdir():
        if file.is_file():
            file.unlink()


def _quantized(model: ir.Model, held: Sequence[InputArrays], folder: Path, quantizer: Quantizer) -> ir.Model:
    """Write a graph into `folder`, and quantize it into the folder `quantized` there."""
    result = folder / "quantized" / GRAPH_FILE
    result.parent.mkdir(parents=True)
    ir.save(model, folder / GRAPH_FILE, external_data=WEIGHTS_FILE)
    names = [str(value.name) for value in model.graph.inputs]
    quantizer(folder / GRAPH_FILE, result, ({name: values[name] for name in names} for values in held))
    return ir.load(result)


def _advance(graph: Path, names: Sequence[str], held: Sequence[InputArrays]) -> None:
    """Add to the values held for each call those that a part of the graph computes from them."""
    session = open_session(graph, "cpu")
    needed = [each.name for each in session.get_inputs()]
    for values in held:
        values.update(zip(names, session.run(names, {name: values[name] for name in needed}), strict=True))


def _joined(model: ir.Model, parts: Sequence[ir.Model]) -> ir.Model:
    """The graph that the parts make, with the inputs and outputs of `model`; the parts are used up."""
    inputs = [ir.Value(name=value.name, shape=value.shape, type=value.type) for value in model.graph.inputs]
    graph = ir.Graph(inputs, [], nodes=[], opset_imports=dict(model.opset_imports), name=model.graph.name)
    known, nodes_known = {str(value.name): value for value in inputs}, set[str]()
    for index, part in enumerate(parts):
        for value in part.graph.inputs:
            replace_all_uses_with(value, known[str(value.name)], replace_graph_outputs=True)
        for name, value in list(part.graph.initializers.items()):
            del part.graph.initializers[name]
            _add_initializer(graph, value, index)
        nodes = list(part.graph)
        part.graph.outputs.clear()
        part.graph.remove(nodes)
        graph.extend(nodes)
        for node in nodes:
            if node.name in nodes_known:  # two parts quantize the same value
                node.name = f"{node.name}.{index}"
            nodes_known.add(str(node.name))
            for value in filter(lambda each: each.name, node.outputs):
                if value.name in known:
                    value.name = f"{value.name}.{index}"
                known[str(value.name)] = value
        graph.opset_imports.update(part.opset_imports)
    graph.outputs.extend(known[str(value.name)] for value in model.graph.outputs)
    return ir.Model(graph, ir_version=max(part.ir_version for part in parts))


def _add_initializer(graph: ir.Graph, value: ir.Value, part: int) -> None:
    """Add an initializer, unless the graph has the same one; another one of its name gets another name."""
    present = graph.initializers.get(str(value.name))
    if present is None:
        graph.initializers[str(value.name)] = value
        return
    assert present.const_value is not None
    assert value.const_value is not None
    if np.array_equal(present.const_value.numpy(), value.const_value.numpy()):
        replace_all_uses_with(value, present)
        return
    value.name = f"{value.name}.{part}"
    graph.initializers[value.name] = value
