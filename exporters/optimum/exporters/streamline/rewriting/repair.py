"""Faults of traced graphs that a runtime trips over, each mended where it stands. Knows no architecture."""

from __future__ import annotations

import onnx_ir as ir


def repair(model: ir.Model) -> None:
    """Mend what ONNX Runtime refuses, or its clients cannot read, in place."""
    _unmix_norms(model.graph)
    _widen_logits(model.graph)


def _unmix_norms(graph: ir.Graph) -> None:
    """Cast a norm's input to the type of its scale.

    The standard allows a half-precision input with a float scale, and Gemma's norm in fp16 comes out so; ONNX
    Runtime then expands the operator into a product of two types and refuses the graph.
    """
    for node in graph:
        if node.op_type != "RMSNormalization":
            continue
        value, scale = node.inputs
        if value is not None and scale is not None and scale.dtype is not None and value.dtype != scale.dtype:
            cast = ir.node("Cast", [value], {"to": scale.dtype})
            cast.outputs[0].dtype = scale.dtype
            cast.metadata_props.update(node.metadata_props)
            graph.insert_before(node, cast)
            node.replace_input_with(0, cast.outputs[0])


def _widen_logits(graph: ir.Graph) -> None:
    """Give logits in bfloat16, which neither numpy nor GenAI's search can read, as float."""
    [place] = [place for place, value in enumerate(graph.outputs) if value.name == "logits"]
    logits = graph.outputs[place]
    if logits.dtype != ir.DataType.BFLOAT16:
        return
    cast = ir.node("Cast", [logits], {"to": ir.DataType.FLOAT})
    wide = cast.outputs[0]
    wide.shape, wide.dtype = logits.shape, ir.DataType.FLOAT
    wide.name, logits.name = "logits", "logits/bfloat16"
    graph.append(cast)
    graph.outputs[place] = wide
