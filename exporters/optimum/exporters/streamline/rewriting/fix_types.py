"""Change the types in a traced graph that ONNX Runtime or its clients cannot take, for every architecture."""

from __future__ import annotations

import onnx_ir as ir


def fix_types(model: ir.Model) -> None:
    """Give norms inputs of one type, and logits a type that numpy can read, in place."""
    _unify_norm_types(model.graph)
    _widen_logits(model.graph)


def _unify_norm_types(graph: ir.Graph) -> None:
    """Cast the input of each RMS norm to the type of its scale.

    The ONNX standard allows a half-precision input with a float32 scale, and Gemma's norm in fp16 is traced so. ONNX
    Runtime then expands the operator into a multiplication of two types, and refuses it.
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
    """Cast bfloat16 logits to float32: neither numpy nor GenAI's search can read bfloat16."""
    [index] = [index for index, value in enumerate(graph.outputs) if value.name == "logits"]
    logits = graph.outputs[index]
    if logits.dtype != ir.DataType.BFLOAT16:
        return
    cast = ir.node("Cast", [logits], {"to": ir.DataType.FLOAT})
    wide = cast.outputs[0]
    wide.shape, wide.dtype = logits.shape, ir.DataType.FLOAT
    wide.name, logits.name = "logits", "logits/bfloat16"
    graph.append(cast)
    graph.outputs[index] = wide
