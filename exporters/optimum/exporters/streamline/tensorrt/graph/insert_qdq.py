"""Quantize the graph of an engine: insert `QuantizeLinear` and `DequantizeLinear` around matmuls, as TensorRT expects.

Each quantized weight is stored as integers or 8-bit floats and passes through `DequantizeLinear`. For a calibrated
quantizer the activation passes through both operators, with a scale from calibration text. The builder fuses each such
group into one low-precision matmul. All operators are standard ONNX, so ONNX Runtime on a CPU can run the graph too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from optimum.exporters.streamline.graph_files import GRAPH_FILE
from optimum.exporters.streamline.onnx.quantization.in_segments import SEGMENT
from optimum.exporters.streamline.onnx.quantization.settings import Quantization
from optimum.exporters.streamline.onnx.segmented_runner import SegmentedRunner
from optimum.exporters.streamline.parity.model_calls import Call
from optimum.exporters.streamline.rewriting.excluded_nodes import excluded, module_of
from optimum.exporters.streamline.rewriting.fuse_for_ort import is_weight_matmul, split_biases
from optimum.exporters.streamline.rewriting.graph_helpers import initializer, read_weight, static_shape
from optimum.exporters.streamline.rewriting.public_names import MaskInput
from optimum.exporters.streamline.rewriting.to_float32 import write_float32
from optimum.streamline.errors import StreamlineError

from .quantizers import ENGINE_QUANTIZERS, EngineQuantizer
from .reference_runner import StaticInputs

WEIGHTS_FILE = f"{GRAPH_FILE}.data"

_MIN_RANGE = float(np.finfo(np.float16).tiny)  # the least value of a largest absolute number: a scale must not be 0
_DTYPES = {"int8": np.dtype(np.int8), "fp8": np.dtype(ml_dtypes.float8_e4m3fn), "int4": np.dtype(ml_dtypes.int4)}


def quantize_engine_graph(source: Path, target: Path, quantization: Quantization, masks: Sequence[MaskInput]) -> None:
    """Quantize the graph in the folder `source` into the folder `target`.

    An output projection that is tied to the embedding stays in float.

    Args:
        source: The folder of the graph, which has static caches.
        target: The folder to write into.
        quantization: The settings; the quantizer is a key of `ENGINE_QUANTIZERS`, and a calibrated one needs windows.
        masks: The graph's mask inputs.

    Raises:
        StreamlineError: the quantizer does not take the input width of a matmul.
    """
    quantizer, dtype = ENGINE_QUANTIZERS[quantization.quantizer], _DTYPES[quantization.quantizer]
    model = ir.load(source / GRAPH_FILE)
    split_biases(model.graph)
    matmuls = [node for node in model.graph if is_weight_matmul(node)]
    kept = excluded(matmuls, quantization.exclude)
    matmuls = [node for node in matmuls if node not in kept]
    _check_blocks(matmuls, quantization.quantizer)
    ranges = _ranges(model, matmuls, quantization, masks, target) if quantizer.calibrated else {}
    for node in matmuls:
        if quantizer.calibrated:
            _quantize_activation(model.graph, node, ranges, quantizer, dtype)
        _quantize_weight(model.graph, node, quantizer, dtype)
    ir.save(model, target / GRAPH_FILE, external_data=WEIGHTS_FILE)
    _quantized.cache_clear()


def _check_blocks(matmuls: Sequence[ir.Node], quantizer: str) -> None:
    block = ENGINE_QUANTIZERS[quantizer].block
    for node in matmuls:
        depth = static_shape(node.inputs[1])[0]
        if block and depth % block:
            raise StreamlineError(
                f"quantize {quantizer!r}: {module_of(node)} has an input width of {depth}, no multiple of the block "
                f"size {block}; quantize-exclude it, or use another quantizer"
            )


def _ranges(
    model: ir.Model, matmuls: Sequence[ir.Node], quantization: Quantization, masks: Sequence[MaskInput], scratch: Path
) -> dict[str, float]:
    """The largest absolute number on the calibration text, of each value that a matmul reads, by its name."""
    assert quantization.windows is not None
    with TemporaryDirectory(dir=scratch) as folder:
        as_exported, as_float32 = Path(folder) / "exported", Path(folder) / "float32"
        for each in (as_exported, as_float32):
            each.mkdir()
        ir.save(model, as_exported / GRAPH_FILE, external_data=WEIGHTS_FILE)
        write_float32(as_exported / GRAPH_FILE, as_float32 / GRAPH_FILE)
        inputs = StaticInputs.of_model(ir.load(as_float32 / GRAPH_FILE), masks)
        runner = SegmentedRunner(as_float32, quantization.hidden, SEGMENT, inputs=inputs)
        prompts = [Call(window[None], np.ones_like(window[None])) for window in quantization.windows.ids.numpy()]
        return runner.largest(prompts, {str(node.inputs[0].name) for node in matmuls if node.inputs[0] is not None})


def _quantize_activation(
    graph: ir.Graph, node: ir.Node, ranges: Mapping[str, float], quantizer: EngineQuantizer, dtype: np.dtype
) -> None:
    """Let the activation that a matmul reads pass through `QuantizeLinear` and `DequantizeLinear`, once per value."""
    activation, weight = node.inputs
    assert activation is not None
    assert weight is not None
    quantize = next((use.node for use in activation.uses() if use.node.op_type == "QuantizeLinear"), None)
    if quantize is None:  # the first matmul that reads this value
        assert weight.dtype is not None
        step = max(ranges[str(activation.name)], _MIN_RANGE) / quantizer.largest
        scale = initializer(graph, ir.tensor(np.asarray(step, weight.dtype.numpy()), name=f"{activation.name}_scale"))
        zero = initializer(graph, ir.tensor(np.zeros((), dtype), name=f"zero_{dtype.name}"))
        quantize = ir.node("QuantizeLinear", [activation, scale, zero], name=f"{module_of(node)}/QuantizeLinear")
        inputs = [quantize.outputs[0], scale, zero]
        dequantize = ir.node("DequantizeLinear", inputs, name=f"{module_of(node)}/Dequantize")
        dequantize.outputs[0].type = activation.type
        graph.insert_before(node, [quantize, dequantize])
    [dequantize_use] = quantize.outputs[0].uses()
    node.replace_input_with(0, dequantize_use.node.outputs[0])


def _quantize_weight(graph: ir.Graph, node: ir.Node, quantizer: EngineQuantizer, dtype: np.dtype) -> None:
    """Replace the weight of a matmul by its quantized values and a `DequantizeLinear`."""
    weight = node.inputs[1]
    assert weight is not None
    assert weight.dtype is not None
    depth, width = static_shape(weight)
    block = quantizer.block
    shape = [depth // block, width] if block else [width]
    options = {"axis": 0, "block_size": block} if block else {"axis": 1}
    read = partial(_part, weight, quantizer, dtype)
    parts = [
        ir.LazyTensor(partial(read, 0), dtype=ir.DataType.from_numpy(dtype), shape=ir.Shape([depth, width]),
                      name=f"{weight.name}_quantized"),
        ir.LazyTensor(partial(read, 1), dtype=weight.dtype, shape=ir.Shape(shape), name=f"{weight.name}_scale"),
    ]  # fmt: skip
    values = [initializer(graph, part) for part in parts]
    dequantize = ir.node("DequantizeLinear", values, options, name=f"{module_of(node)}/DequantizeLinear")
    dequantize.outputs[0].type, dequantize.outputs[0].shape = weight.type, weight.shape
    graph.insert_before(node, dequantize)
    node.replace_input_with(1, dequantize.outputs[0])
    if not weight.uses():
        del graph.initializers[str(weight.name)]


def _part(weight: ir.Value, quantizer: EngineQuantizer, dtype: np.dtype, index: int) -> ir.TensorProtocol:
    return ir.tensor(_quantized(weight, quantizer, dtype)[index])


@lru_cache(maxsize=1)  # saving the graph asks for a weight's values and right after for its scales
def _quantized(
    weight: ir.Value, quantizer: EngineQuantizer, dtype: np.dtype
) -> tuple[npt.NDArray[np.generic], npt.NDArray[np.generic]]:
    """The quantized values `[K, N]` of a weight `[K, N]`, and their scales `[N]` or `[K / block, N]`."""
    array = read_weight(weight)
    depth, width = array.shape
    blocks = array.astype(np.float32).reshape(-1, quantizer.block or depth, width)
    largest = np.abs(blocks).max(axis=1, keepdims=True)
    # Scales are rounded to their stored type first, so that values are rounded to multiples of the stored scales.
    scales = (np.maximum(largest, _MIN_RANGE) / quantizer.largest).astype(array.dtype)
    scaled = np.clip(blocks / scales.astype(np.float32), -quantizer.largest, quantizer.largest)
    values = scaled if dtype == _DTYPES["fp8"] else np.rint(scaled)
    flat_scales = scales.squeeze(1) if quantizer.block else scales.reshape(width)
    return values.reshape(depth, width).astype(dtype), flat_scales
