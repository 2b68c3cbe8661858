"""Quantizing the graph of an engine: `QuantizeLinear` and `DequantizeLinear` around products, as TensorRT reads them.

Weights are held quantized; what multiplies them passes through both operators, on scales that text gave, or stays
float. The builder makes of each such group one product of narrow numbers. Only standard operators: what the graph then
computes can be computed by ONNX Runtime's CPU, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnxruntime.quantization import CalibrationMethod
from onnxruntime.quantization.calibrate import create_calibrator

from optimum.exporters.streamline.graph_files import GRAPH_FILE
from optimum.exporters.streamline.onnx.quantization.calibration_inputs import CalibrationReader, InputArrays
from optimum.exporters.streamline.onnx.quantization.settings import Quantization
from optimum.exporters.streamline.rewriting.edits import initializer, static_shape
from optimum.exporters.streamline.rewriting.excluded_nodes import excluded, module_of
from optimum.exporters.streamline.rewriting.fuse_for_ort import is_weight_matmul, split_biases
from optimum.exporters.streamline.rewriting.public_names import MaskInput
from optimum.exporters.streamline.rewriting.to_float32 import write_float32
from optimum.streamline.errors import StreamlineError

from .quantizers import ENGINE_QUANTIZERS, EngineQuantizer
from .reference_runner import StaticOnnxRunner

WEIGHTS_FILE = f"{GRAPH_FILE}.data"

_LEAST = float(np.finfo(np.float16).tiny)  # of a largest number: a scale must not be 0
_NUMBERS = {"int8": np.dtype(np.int8), "fp8": np.dtype(ml_dtypes.float8_e4m3fn), "int4": np.dtype(ml_dtypes.int4)}


def quantize_engine_graph(source: Path, target: Path, quantization: Quantization, masks: Sequence[MaskInput]) -> None:
    """Quantize the graph in the folder `source` into `target`.

    The output projection stays float where it is the embedding.

    Args:
        quantization: Its way is one of `ENGINE_QUANTIZERS`; a calibrated one needs text.
        masks: The graph's inputs that are masks.

    Raises:
        StreamlineError: a product cannot be quantized so.
    """
    way, numbers = ENGINE_QUANTIZERS[quantization.quantizer], _NUMBERS[quantization.quantizer]
    model = ir.load(source / GRAPH_FILE)
    split_biases(model.graph)
    products = [node for node in model.graph if is_weight_matmul(node)]
    kept = excluded(products, quantization.exclude)
    products = [node for node in products if node not in kept]
    _check_blocks(products, quantization.quantizer)
    ranges = _ranges(model, quantization, masks, target) if way.calibrated else {}
    for node in products:
        if way.calibrated:
            _quantize_activation(model.graph, node, ranges, way, numbers)
        _quantize_weight(model.graph, node, way, numbers)
    ir.save(model, target / GRAPH_FILE, external_data=WEIGHTS_FILE)
    _quantized.cache_clear()


def _check_blocks(products: Sequence[ir.Node], how: str) -> None:
    block = ENGINE_QUANTIZERS[how].block
    for node in products:
        depth = static_shape(node.inputs[1])[0]
        if block and depth % block:
            raise StreamlineError(
                f"quantize {how!r}: {module_of(node)} multiplies {depth} numbers, which are not whole blocks of "
                f"{block}; quantize-exclude it, or use another way"
            )


def _ranges(model: ir.Model, quantization: Quantization, masks: Sequence[MaskInput], scratch: Path) -> dict[str, float]:
    """The largest absolute number that text gives, of each value that a product reads."""
    assert quantization.windows is not None
    with TemporaryDirectory(dir=scratch) as folder:
        narrow, wide = Path(folder) / "narrow", Path(folder) / "wide"
        for each in (narrow, wide):
            each.mkdir()
        ir.save(model, narrow / GRAPH_FILE, external_data=WEIGHTS_FILE)
        write_float32(narrow / GRAPH_FILE, wide / GRAPH_FILE)
        calibrator = create_calibrator(
            wide / GRAPH_FILE,
            ["MatMul"],
            str(Path(folder) / "augmented.onnx"),
            CalibrationMethod.MinMax,
            use_external_data_format=True,
        )
        calibrator.collect_data(CalibrationReader(_prompts(wide, masks, quantization.windows.ids.numpy())))
        found = calibrator.compute_data().data
        return {name: float(np.abs(each.range_value).max()) for name, each in found.items()}


def _prompts(folder: Path, masks: Sequence[MaskInput], windows: npt.NDArray[np.int64]) -> Iterator[InputArrays]:
    runner = StaticOnnxRunner(folder, masks)
    for window in windows:
        yield runner.prompt_inputs(window[None])


def _quantize_activation(
    graph: ir.Graph, node: ir.Node, ranges: Mapping[str, float], way: EngineQuantizer, numbers: np.dtype
) -> None:
    read, weight = node.inputs
    assert read is not None
    assert weight is not None
    quantized = next((use.node for use in read.uses() if use.node.op_type == "QuantizeLinear"), None)
    if quantized is None:  # the first of the products that read the same
        assert weight.dtype is not None
        step = max(ranges[str(read.name)], _LEAST) / way.most
        scale = initializer(graph, ir.tensor(np.asarray(step, weight.dtype.numpy()), name=f"{read.name}_scale"))
        zero = initializer(graph, ir.tensor(np.zeros((), numbers), name=f"zero_{numbers.name}"))
        quantized = ir.node("QuantizeLinear", [read, scale, zero], name=f"{module_of(node)}/QuantizeLinear")
        back = ir.node("DequantizeLinear", [quantized.outputs[0], scale, zero], name=f"{module_of(node)}/Dequantize")
        back.outputs[0].type = read.type
        graph.insert_before(node, [quantized, back])
    [back_use] = quantized.outputs[0].uses()
    node.replace_input_with(0, back_use.node.outputs[0])


def _quantize_weight(graph: ir.Graph, node: ir.Node, way: EngineQuantizer, numbers: np.dtype) -> None:
    weight = node.inputs[1]
    assert weight is not None
    assert weight.dtype is not None
    depth, width = static_shape(weight)
    shape = [depth // way.block, width] if way.block else [width]
    options = {"axis": 0, "block_size": way.block} if way.block else {"axis": 1}
    read = partial(_part, weight, way, numbers)
    parts = [
        ir.LazyTensor(partial(read, 0), dtype=ir.DataType.from_numpy(numbers), shape=ir.Shape([depth, width]),
                      name=f"{weight.name}_quantized"),
        ir.LazyTensor(partial(read, 1), dtype=weight.dtype, shape=ir.Shape(shape), name=f"{weight.name}_scale"),
    ]  # fmt: skip
    values = [initializer(graph, part) for part in parts]
    back = ir.node("DequantizeLinear", values, options, name=f"{module_of(node)}/DequantizeLinear")
    back.outputs[0].type, back.outputs[0].shape = weight.type, weight.shape
    graph.insert_before(node, back)
    node.replace_input_with(1, back.outputs[0])
    if not weight.uses():
        del graph.initializers[str(weight.name)]


def _part(weight: ir.Value, way: EngineQuantizer, numbers: np.dtype, place: int) -> ir.TensorProtocol:
    return ir.tensor(_quantized(weight, way, numbers)[place])


@lru_cache(maxsize=1)  # the numbers of a weight are written first and its scales right after
def _quantized(
    weight: ir.Value, way: EngineQuantizer, numbers: np.dtype
) -> tuple[npt.NDArray[np.generic], npt.NDArray[np.generic]]:
    """The numbers `[K, N]` of a weight, and their scales `[N]` or `[K / block, N]`."""
    assert weight.const_value is not None
    array = weight.const_value.numpy()
    depth, width = array.shape
    blocks = array.astype(np.float32).reshape(-1, way.block or depth, width)
    largest = np.abs(blocks).max(axis=1, keepdims=True)
    # Rounded as it is held: numbers are then to the steps that they will be multiplied by.
    scales = (np.maximum(largest, _LEAST) / way.most).astype(array.dtype)
    steps = np.clip(blocks / scales.astype(np.float32), -way.most, way.most)
    whole = steps if numbers == _NUMBERS["fp8"] else np.rint(steps)
    return whole.reshape(depth, width).astype(numbers), scales.squeeze(1) if way.block else scales.reshape(width)
