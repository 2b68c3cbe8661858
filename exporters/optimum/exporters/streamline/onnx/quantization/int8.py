"""Quantize weights and activations to 8 bits with onnxruntime's quantizers, dynamic or static (QDQ)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import onnx_ir as ir
from onnxruntime.quantization import QuantFormat, QuantType, quantize_dynamic, quantize_static

from optimum.exporters.streamline.graph_files import GRAPH_FILE, WEIGHTS_FILE
from optimum.exporters.streamline.rewriting.excluded_nodes import excluded
from optimum.exporters.streamline.rewriting.graph_helpers import MATMUL_OPERATORS
from optimum.exporters.streamline.rewriting.tied_embedding import untie_embedding

from .calibration_inputs import CalibrationReader, InputArrays
from .in_segments import quantize_in_segments
from .settings import Quantization


def quantize_int8(source: Path, target: Path, quantization: Quantization, calibrated: bool) -> None:
    """Quantize the graph in the folder `source` to 8 bits, into the folder `target`.

    Args:
        source: The folder of the float32 graph.
        target: The folder to write into.
        quantization: The excluded modules, and the calibration text.
        calibrated: Whether activation scales come from `quantization.windows` (static); otherwise the graph computes
            them at each call (dynamic).
    """
    model = ir.load(source / GRAPH_FILE)
    untie_embedding(model.graph)
    matmuls = [node for node in model.graph if node.op_type in MATMUL_OPERATORS]
    kept = [str(node.name) for node in excluded(matmuls, quantization.exclude)]
    options = {
        "op_types_to_quantize": list(MATMUL_OPERATORS),
        "nodes_to_exclude": kept,
        "per_channel": True,
        "weight_type": QuantType.QInt8,
        "use_external_data_format": True,
        "extra_options": {"MatMulConstBOnly": True},
    }

    def quantize(plain: Path, quantized: Path, inputs: Iterator[InputArrays]) -> None:
        if calibrated:
            reader = CalibrationReader(inputs)
            quantize_static(plain, quantized, reader, QuantFormat.QDQ, activation_type=QuantType.QUInt8, **options)
        else:
            quantize_dynamic(plain, quantized, **options)

    with TemporaryDirectory(dir=target) as scratch:
        # Without the text if it is not needed, because the graph would be run on it between segments.
        settings = quantization if calibrated else replace(quantization, windows=None)
        model = quantize_in_segments(model, settings, Path(scratch), quantize)
        ir.save(model, target / GRAPH_FILE, external_data=WEIGHTS_FILE)
