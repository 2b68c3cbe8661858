"""Faults of traced graphs that a runtime trips over, each mended where it stands. Knows no architecture."""

from __future__ import annotations

import onnx_ir as ir


def repair(model: ir.Model) -> None:
    """Mend what ONNX Runtime refuses, in place."""
    _unmix_norms(model.graph)


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
