"""From a torch model to an ONNX graph: the one file that meets transformers' exporters.

They are experimental, so the extra `onnx` pins their minor version and `parity.py` judges every graph. The
graph comes out with their names; `names.py` gives it those of the ecosystem.
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

from optimum.streamline.anatomy import head_size, key_value_heads
from optimum.streamline.dead import cache_numbers

OPSET = 23
"""The first with `Attention`, `RMSNormalization` and `RotaryEmbedding`; 24 falls back to decomposed norms."""

# All different, or the tracer takes lengths that happen to be equal for one. More than one row, or the batch is frozen.
# So few tokens that no sliding window in use is full, and every cache entry has the length of the text.
ROWS, PAST, NEW = 4, 3, 2


def trace(model: PreTrainedModel) -> ir.Model:
    """One graph for prefill (empty past), continuation and decode, for any batch, honouring the attention mask.

    Args:
        model: A skeleton, in evaluation mode, in the dtype to export.

    Returns:
        A graph of standard operators. Its weights are initializers without values, under their names in `model`.
    """
    model.config.use_cache = True
    inputs = _sample(model)
    shapes = _dynamic_shapes(model, inputs)
    config = OnnxConfig(dynamic=True, dynamic_shapes=shapes, opset_version=OPSET, optimize=False)
    # Where shapes are symbols, to remember what each operator gave costs more than to ask again: a fifth of the trace.
    with torch._dynamo.config.patch(fake_tensor_cache_enabled=False):
        program: ir.Model = OnnxExporter().export(model, inputs, config).program
    weights = _take_weights(program.graph, {name for name, _ in model.named_parameters(remove_duplicate=False)})
    # What torch.onnx does when it optimizes, but weights are inputs meanwhile: no rule may look into their values,
    # for there are none yet.
    onnxscript.optimizer.optimize_ir(program)
    onnxscript.rewriter.onnx_fusions.fuse(program)
    ShapeInferencePass()(program)  # fusions leave some values without a type
    for value in weights:
        program.graph.inputs.remove(value)
        program.graph.initializers[str(value.name)] = value
    return program


def _take_weights(graph: ir.Graph, names: set[str]) -> list[ir.Value]:
    taken = [value for name, value in graph.initializers.items() if name in names]
    for value in taken:
        del graph.initializers[str(value.name)]
        value.const_value = None
        graph.inputs.append(value)
    return taken


def _sample(model: PreTrainedModel) -> dict[str, Any]:
    # One row is left-padded, or the mask is found to be unused and its input dropped. Which tokens there are is of no
    # consequence: only shapes are traced.
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
    for number in cache_numbers(model):
        if number is not None:
            cache.update(states, states, number)
    return cache


def _dynamic_shapes(model: PreTrainedModel, inputs: dict[str, Any]) -> Any:
    # Without them every axis is taken to vary, and a number of heads that happens to be a length in the sample
    # freezes that length.
    register_cache_pytrees_for_model(model)
    return _varying(get_auto_dynamic_shapes(inputs))


def _varying(axes: Any) -> Any:
    """Of each tensor's axes those that vary: rows and length, of `[rows, length]` or `[rows, heads, length, size]`."""
    if isinstance(axes, dict) and 0 in axes:
        return {axis: axes[axis] for axis in ((0, 2) if len(axes) == 4 else (0, 1))}
    if isinstance(axes, dict):
        return {name: _varying(value) for name, value in axes.items()}
    return [_varying(each) for each in axes] if isinstance(axes, list) else axes
