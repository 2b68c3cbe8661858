"""The table of quantizers for an ONNX graph; each calls a quantizer of onnxruntime.

A quantizer reads a folder with a float32 graph that was compared with torch, and writes the quantized graph to another
folder.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from optimum.streamline.errors import StreamlineError

from .settings import NONE, Quantization


@dataclass(frozen=True)
class GraphQuantizer:
    """A quantizer for an ONNX graph.

    Args:
        run: The function that quantizes; it takes the folder to read, the folder to write, and the settings.
        description: One line for the user.
        calibrated: Whether it needs calibration text.
    """

    run: Callable[[Path, Path, Quantization], None]
    description: str
    calibrated: bool = False


def _int4(algorithm: str) -> Callable[[Path, Path, Quantization], None]:
    def run(source: Path, target: Path, quantization: Quantization) -> None:
        from .int4 import quantize_int4

        quantize_int4(source, target, quantization, algorithm)

    return run


def _int8(calibrated: bool) -> Callable[[Path, Path, Quantization], None]:
    def run(source: Path, target: Path, quantization: Quantization) -> None:
        from .int8 import quantize_int8

        quantize_int8(source, target, quantization, calibrated)

    return run


GRAPH_QUANTIZERS: dict[str, GraphQuantizer] = {
    "int8": GraphQuantizer(
        _int8(calibrated=False), "weights and activations in 8 bits, activation scales computed at run time"
    ),
    "int8-static": GraphQuantizer(
        _int8(calibrated=True),
        "weights and activations in 8 bits, activation scales from calibration text (QDQ)",
        calibrated=True,
    ),
    "int4": GraphQuantizer(_int4("rtn"), "weights in 4 bits, blocks of 32, rounded to nearest (MatMulNBits)"),
    "int4-hqq": GraphQuantizer(
        _int4("hqq"), "weights in 4 bits, blocks of 32, offsets by half-quadratic quantization (HQQ)"
    ),
    "int4-gptq": GraphQuantizer(
        _int4("gptq"), "weights in 4 bits, blocks of 32, rounded by their effect on calibration text (GPTQ)", True
    ),
}
"""The quantizers for ONNX graphs, by name."""


def check_quantizer(name: str, dtype: str) -> GraphQuantizer:
    """Look up a quantizer, and check that it takes a graph of this dtype.

    Args:
        name: A key of `GRAPH_QUANTIZERS`.
        dtype: The dtype of the export: `fp32`, `fp16` or `bf16`.

    Raises:
        StreamlineError: there is no such quantizer, or the dtype is not `fp32`.
    """
    if name not in GRAPH_QUANTIZERS:
        raise StreamlineError(f"quantize {name!r}: unknown; one of {', '.join((NONE, *GRAPH_QUANTIZERS))}")
    if dtype != "fp32":
        raise StreamlineError(f"quantize {name!r}: starts from dtype 'fp32', not {dtype!r}")
    return GRAPH_QUANTIZERS[name]
