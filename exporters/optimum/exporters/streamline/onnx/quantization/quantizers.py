"""Quantizing an exported graph: one table of ways, onnxruntime's own quantizers behind each.

What goes in is a folder with a float graph that was proved equal to torch; what comes out is another graph file.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from optimum.streamline.errors import StreamlineError

from .settings import NONE, Quantization


@dataclass(frozen=True)
class GraphQuantizer:
    """One way to quantize.

    Args:
        run: Quantizes the graph in one folder into another.
        text: What it does, for a user who chooses.
        calibrated: Whether it needs text.
    """

    run: Callable[[Path, Path, Quantization], None]
    text: str
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
    "int8": GraphQuantizer(_int8(calibrated=False), "weights in 8 bits, activations too, scaled as they come"),
    "int8-static": GraphQuantizer(
        _int8(calibrated=True), "the same, activations scaled by what text gave (QDQ)", calibrated=True
    ),
    "int4": GraphQuantizer(_int4("rtn"), "weights in 4 bits, blocks of 32 rounded to nearest (MatMulNBits)"),
    "int4-hqq": GraphQuantizer(_int4("hqq"), "the same, offsets chosen by half-quadratic optimization"),
    "int4-gptq": GraphQuantizer(
        _int4("gptq"), "the same, weights rounded by what they do to text (GPTQ)", calibrated=True
    ),
}


def check_quantization(how: str, dtype: str) -> GraphQuantizer:
    """The way of this name, if it can be used.

    Raises:
        StreamlineError: there is none, or not for this dtype.
    """
    if how not in GRAPH_QUANTIZERS:
        raise StreamlineError(f"quantize {how!r}: unknown; one of {', '.join((NONE, *GRAPH_QUANTIZERS))}")
    if dtype != "fp32":
        raise StreamlineError(f"quantize {how!r}: starts from dtype 'fp32', not {dtype!r}")
    return GRAPH_QUANTIZERS[how]


def weight_bytes(folder: Path, active_share: float = 1.0) -> int:
    """Bytes of the weights in `folder` that a token is multiplied by: all but the tables that it is looked up in.

    Args:
        active_share: The share of the experts that a token goes through.
    """
    import onnx_ir as ir

    from optimum.exporters.streamline.graph_files import GRAPH_FILE

    weights = ir.load(folder / GRAPH_FILE).graph.initializers.values()
    read = [value for value in weights if {use.node.op_type for use in value.uses()} != {"Gather"}]
    shares = ((value, active_share if ".experts." in str(value.name) else 1.0) for value in read)
    return round(sum(value.const_value.nbytes * share for value, share in shares if value.const_value is not None))
