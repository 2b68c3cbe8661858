"""What TensorRT would refuse, or worse, take and compute otherwise: rules that a graph is held to before any builder.

Each rule comes of a fault that was met: an operator that is said to be supported and then is not, an input that the
parser drops in silence, an attention that it computes another way.
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
        "Transpose",
        "Unsqueeze",
    }
)
"""Those that engines have been built of; a further one is added with a test that builds an engine of it."""

_ATTENTION_INPUTS = 4  # query, key, value, mask; further ones are a past, and the number of keys that are no padding


def check_graph(model: ir.Model) -> None:
    """Hold a graph with static caches to every rule.

    Raises:
        StreamlineError: naming the node, input or output, and the rule.
    """
    for rule in RULES:
        for fault in rule(model.graph):
            raise StreamlineError(f"cannot be built for TensorRT: {fault}")


def _opset(graph: ir.Graph) -> Iterator[str]:
    """A later opset's operators fall back to others, an earlier one has no `TensorScatter`."""
    for domain, version in graph.opset_imports.items():
        if domain not in ("", "ai.onnx"):
            yield f"its graph has operators of {domain!r}, and only those of the standard are taken"
        elif version != OPSET:
            yield f"its graph is of opset {version}, not {OPSET}"


def _operators(graph: ir.Graph) -> Iterator[str]:
    """`supports_operator` says yes to operators that then fail: these are known not to."""
    for node in graph:
        if node.domain not in ("", "ai.onnx") or node.op_type not in OPERATORS:
            yield f"{node.name or node.op_type}: operator {node.op_type} is not among those that engines are built of"


def _attention(graph: ir.Graph) -> Iterator[str]:
    """The parser drops what masks but the mask, and refuses the rest of what `Attention` may have."""
    for node in graph:
        if node.op_type != "Attention":
            continue
        given = [place for place, value in enumerate(node.inputs) if value is not None]
        if len(given) < _ATTENTION_INPUTS:
            yield f"{node.name}: Attention has no mask"
        if max(given) >= _ATTENTION_INPUTS:
            yield f"{node.name}: Attention has an input beyond the mask ({node.inputs[max(given)].name})"  # type: ignore[union-attr]
        if node.attributes.get_int("is_causal", 0):
            yield f"{node.name}: Attention is causal beside its mask"
        if node.attributes.get_float("softcap", 0.0):
            yield f"{node.name}: Attention caps its scores"
        if len([value for value in node.outputs if value.uses() or value.is_graph_output()]) > 1:
            yield f"{node.name}: Attention has more than one output"


def _inputs_are_read(graph: ir.Graph) -> Iterator[str]:
    """An input that the parser drops changes nothing, and nothing says so."""
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
    """Rows and new tokens vary, nothing else; and the name of an axis is no number, which the parser takes for one."""
    for value in (*graph.inputs, *graph.outputs):
        if value.shape is None:
            yield f"{value.name} has no shape"
            continue
        for place, axis in enumerate(value.shape):
            name = axis.value if isinstance(axis, ir.SymbolicDim) else None
            if isinstance(axis, int) or name in (BATCH, SEQUENCE):
                continue
            said = "is named by a number" if name is not None and name.isdigit() else "must be a number"
            yield f"{value.name}: axis {place}, {name!r}, {said}"


def _caches(graph: ir.Graph) -> Iterator[str]:
    """What a cache becomes lies where it was: it has its shape and type, and is written by `TensorScatter` alone."""
    for written, read in cache_aliases(graph).items():
        node = written.producer()
        if node is None or node.op_type != "TensorScatter" or node.inputs[0] is not read:
            yield f"{written.name} is not {read.name} with new tokens written into it"
        elif written.shape != read.shape or written.dtype != read.dtype:
            yield f"{written.name} is {written.dtype}{written.shape}, and {read.name} {read.dtype}{read.shape}"


def cache_aliases(graph: ir.Graph) -> dict[ir.Value, ir.Value]:
    """The cache outputs, each with the input that it lies in the place of."""
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
