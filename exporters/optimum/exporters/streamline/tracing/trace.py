"""Trace a torch model to an ONNX graph. No other file calls `transformers.exporters` for tracing.

They are experimental, so the extra `onnx` pins the minor version of transformers, and `parity/compare.py` checks every
graph. The graph has the tracer's input and output names; `public_names.py` replaces them later.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import onnxscript.optimizer
import onnxscript.rewriter.onnx_fusions
import torch
from onnx_ir.passes.common import ShapeInferencePass
from transformers import DynamicCache, PreTrainedModel
from transformers.exporters.configs import OnnxConfig
from transformers.exporters.exporter_dynamo import get_auto_dynamic_shapes, register_cache_pytrees_for_model
from transformers.exporters.exporter_onnx import OnnxExporter

from optimum.streamline.models.architectures import head_size, key_value_heads
from optimum.streamline.models.skipped_sublayers import cache_indices

OPSET = 23
"""The first opset with `Attention`, `RMSNormalization` and `RotaryEmbedding`.

Opset 24 is not used here: with it the tracer writes norms as several simple operators.
"""

# The sizes of the sample input: rows, past tokens, new tokens. They all differ, because the tracer would treat equal
# sizes as one axis. There is more than one row, because the tracer would fix a batch size of 1. There are so few tokens
# that no sliding window is full, so every cache entry has the length of the text.
ROWS, PAST, NEW = 4, 3, 2


def trace(model: PreTrainedModel) -> ir.Model:
    """Trace one graph that serves prefill (with an empty cache), continuation and decode.

    Batch size and lengths vary, and the graph obeys the attention mask.

    Args:
        model: A skeleton (`skeleton.py`), in evaluation mode, in the dtype to export.

    Returns:
        A graph of standard ONNX operators. Its weights are initializers without values, named as the parameters of
        `model`.
    """
    model.config.use_cache = True
    inputs = _sample(model)
    shapes = _dynamic_shapes(model, inputs)
    config = OnnxConfig(dynamic=True, dynamic_shapes=shapes, opset_version=OPSET, optimize=False)
    # Where shapes are symbols, to remember what each operator gave costs more than to ask again: a fifth of the trace.
    with torch._dynamo.config.patch(fake_tensor_cache_enabled=False):
        program: ir.Model = OnnxExporter().export(model, inputs, config).program
    weights = _take_weights(program.graph, {name for name, _ in model.named_parameters(remove_duplicate=False)})
    # These are the optimizations of torch.onnx. Meanwhile the weights are graph inputs, because they have no values
    # yet and no optimization may read them.
    onnxscript.optimizer.optimize_ir(program)
    onnxscript.rewriter.onnx_fusions.fuse(program)
    ShapeInferencePass()(program)  # fusions leave some values without a type
    for value in weights:
        program.graph.inputs.remove(value)
        program.graph.initializers[str(value.name)] = value
    return program


def _take_weights(graph: ir.Graph, names: set[str]) -> list[ir.Value]:
    """Turn the initializers of these names into graph inputs without values; returns them."""
    taken = [value for name, value in graph.initializers.items() if name in names]
    for value in taken:
        del graph.initializers[str(value.name)]
        value.const_value = None
        graph.inputs.append(value)
    return taken


def _sample(model: PreTrainedModel) -> dict[str, Any]:
    # One row is left-padded: with a mask of ones the tracer would drop the mask input as unused. The token ids do not
    # matter, because the trace depends on shapes alone.
    mask = torch.ones((ROWS, PAST + NEW), dtype=torch.int64)
    mask[0, 0] = 0
    return {
        "input_ids": torch.ones((ROWS, NEW), dtype=torch.int64),
        "attention_mask": mask,
        "position_ids": torch.ones((ROWS, NEW), dtype=torch.int64),
        "past_key_values": _sample_cache(model),
    }


def _sample_cache(model: PreTrainedModel) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    states = torch.zeros((ROWS, key_value_heads(model.config), PAST, head_size(model.config)), dtype=model.dtype)
    for number in cache_indices(model):
        if number is not None:
            cache.update(states, states, number)
    return cache


def _dynamic_shapes(model: PreTrainedModel, inputs: dict[str, Any]) -> Any:
    # Without explicit dynamic shapes every axis is dynamic, and then a number of heads that equals a length of the
    # sample fixes that length in the graph.
    register_cache_pytrees_for_model(model)
    return _batch_and_length(get_auto_dynamic_shapes(inputs))


def _batch_and_length(axes: Any) -> Any:
    """Keep only the batch and length axes of each tensor: `[batch, length]` or `[batch, heads, length, size]`."""
    if isinstance(axes, dict) and 0 in axes:
        return {axis: axes[axis] for axis in ((0, 2) if len(axes) == 4 else (0, 1))}
    if isinstance(axes, dict):
        return {name: _batch_and_length(value) for name, value in axes.items()}
    return [_batch_and_length(each) for each in axes] if isinstance(axes, list) else axes
