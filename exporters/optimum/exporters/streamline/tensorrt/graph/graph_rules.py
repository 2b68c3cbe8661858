"""Check a graph against the rules of TensorRT, before any builder reads it.

A graph that breaks a rule would be refused by TensorRT, or accepted and computed differently. Each rule comes from a
fault that we met: an operator that TensorRT reports as supported but cannot build, an input that its parser drops
without a message, a form of attention that it computes differently.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import onnx_ir as ir

from optimum.exporters.streamline.rewriting.public_names import BATCH, SEQUENCE
from optimum.exporters.streamline.rewriting.static_cache import OPSET
from optimum.streamline.errors import StreamlineError

OPERATORS = frozenset(
    {
        "Add",
        "Attention",
        "Cast",
        "Concat",
        "Cos",
        "DequantizeLinear",
        "Div",
        "Expand",
        "Gather",
        "Gelu",
        "Gemm",
        "LayerNormalization",
        "MatMul",
        "Mul",
        "Neg",
        "Pow",
        "QuantizeLinear",
        "RMSNormalization",
        "Relu",
        "Reshape",
        "RotaryEmbedding",
        "Shape",
        "Sigmoid",
        "Sin",
        "Slice",
        "Softmax",
        "Split",
        "Squeeze",
        "Sub",
        "Tanh",
        "TensorScatter",
        "Tile",
        "Transpose",
        "Unsqueeze",
    }
)
"""The operators that engines were built with. Add another one together with a test that builds an engine with it."""

_ATTENTION_INPUTS = 4  # query, key, value, mask; the others are past keys and values, and a count of valid keys


def check_graph(model: ir.Model) -> None:
    """Check a graph with static caches against every rule.

    Args:
        model: The graph, with public names.

    Raises:
        StreamlineError: the graph breaks a rule; names the node, input or output, and the fault.
    """
    for rule in RULES:
        for fault in rule(model.graph):
            raise StreamlineError(f"cannot be built for TensorRT: {fault}")


def _opset(graph: ir.Graph) -> Iterator[str]:
    """The opset must be `OPSET`: earlier ones lack `TensorScatter`, and TensorRT decomposes operators of later ones."""
    for domain, version in graph.opset_imports.items():
        if domain not in ("", "ai.onnx"):
            yield f"its graph has operators of {domain!r}, only standard ONNX operators are supported"
        elif version != OPSET:
            yield f"its graph has opset {version}, not {OPSET}"


def _operators(graph: ir.Graph) -> Iterator[str]:
    """Only operators that were tested: TensorRT's `supports_operator` accepts operators that then fail to build."""
    for node in graph:
        if node.domain not in ("", "ai.onnx") or node.op_type not in OPERATORS:
            name = node.name or node.op_type
            yield f"{name}: operator {node.op_type} is not among the operators that engines are built of"


def _attention(graph: ir.Graph) -> Iterator[str]:
    """`Attention` must mask by its mask input alone: the parser ignores other ways to mask, and refuses the rest."""
    for node in graph:
        if node.op_type != "Attention":
            continue
        present = [index for index, value in enumerate(node.inputs) if value is not None]
        if len(present) < _ATTENTION_INPUTS:
            yield f"{node.name}: Attention has no mask"
        if max(present) >= _ATTENTION_INPUTS:
            yield f"{node.name}: Attention has an input after the mask ({node.inputs[max(present)].name})"  # type: ignore[union-attr]
        if node.attributes.get_int("is_causal", 0):
            yield f"{node.name}: Attention has is_causal in addition to its mask"
        if node.attributes.get_float("softcap", 0.0):
            yield f"{node.name}: Attention has a softcap"
        if len([value for value in node.outputs if value.uses() or value.is_graph_output()]) > 1:
            yield f"{node.name}: Attention has more than one output"


def _inputs_are_read(graph: ir.Graph) -> Iterator[str]:
    """An output must depend on each input: the parser drops any other input without a message."""
    reached = _reaching_an_output(graph)
    for value in graph.inputs:
        if value not in reached:
            yield f"input {value.name} reaches no output"


def _reaching_an_output(graph: ir.Graph) -> set[ir.Value]:
    reached = set(graph.outputs)
    for node in reversed(list(graph)):
        if any(value in reached for value in node.outputs):
            reached.update(value for value in node.inputs if value is not None)
    return reached


def _axes(graph: ir.Graph) -> Iterator[str]:
    """Only the batch and sequence axes may vary; and an axis whose name is a number is read as that number."""
    for value in (*graph.inputs, *graph.outputs):
        if value.shape is None:
            yield f"{value.name} has no shape"
            continue
        for index, axis in enumerate(value.shape):
            name = axis.value if isinstance(axis, ir.SymbolicDim) else None
            if isinstance(axis, int) or name in (BATCH, SEQUENCE):
                continue
            fault = "has a number for a name" if name is not None and name.isdigit() else "must have a fixed size"
            yield f"{value.name}: axis {index}, {name!r}, {fault}"


def _caches(graph: ir.Graph) -> Iterator[str]:
    """Each cache output must be able to share memory with its input: `TensorScatter`, same shape, same type."""
    for written, read in cache_aliases(graph).items():
        node = written.producer()
        if node is None or node.op_type != "TensorScatter" or node.inputs[0] is not read:
            yield f"{written.name} is not a TensorScatter of new tokens into {read.name}"
        elif written.shape != read.shape or written.dtype != read.dtype:
            yield f"{written.name} is {written.dtype}{written.shape}, but {read.name} is {read.dtype}{read.shape}"


def cache_aliases(graph: ir.Graph) -> dict[ir.Value, ir.Value]:
    """Each cache output of a graph with static caches, with the cache input whose memory it shares."""
    inputs = {str(value.name): value for value in graph.inputs}
    named = {value: str(value.name).replace("present.", "past_key_values.") for value in graph.outputs}
    return {value: inputs[name] for value, name in named.items() if name != value.name and name in inputs}


RULES: tuple[Callable[[ir.Graph], Iterator[str]], ...] = (
    _opset,
    _operators,
    _attention,
    _inputs_are_read,
    _axes,
    _caches,
)
