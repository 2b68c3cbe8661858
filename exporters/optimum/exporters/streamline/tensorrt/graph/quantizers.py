"""The table of quantizers for an engine. Its imports are cheap, because the command line reads it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from optimum.streamline.errors import StreamlineError


@dataclass(frozen=True)
class EngineQuantizer:
    """A quantizer for an engine. It is symmetric (without zero points), because TensorRT takes no other.

    Args:
        description: One line for the user.
        largest: The largest value of the quantized type.
        calibrated: Whether it quantizes activations too, with scales from calibration text.
        min_capability: The least compute capability of a GPU that has the type, as an integer: 89 for 8.9; 0 for all.
        block: The number of weights of a column that share a scale; 0 for the whole column.
    """

    description: str
    largest: float
    calibrated: bool = False
    min_capability: int = 0
    block: int = 0


ENGINE_QUANTIZERS = {
    "int8": EngineQuantizer(
        "weights and activations in 8 bits, activation scales from calibration text", 127, calibrated=True
    ),
    "fp8": EngineQuantizer(
        "weights and activations in 8-bit floats, for GPUs of compute capability 8.9 or later",
        448,
        calibrated=True,
        min_capability=89,
    ),
    "int4": EngineQuantizer("weights in 4 bits, blocks of 64, rounded to nearest", 7, block=64),
}
"""The quantizers for engines, by name."""


def check_engine_quantizer(name: str, capabilities: Sequence[int]) -> EngineQuantizer:
    """Look up a quantizer, and check that GPUs of these compute capabilities support it.

    Args:
        name: A key of `ENGINE_QUANTIZERS`.
        capabilities: The compute capabilities, 89 for 8.9.

    Raises:
        StreamlineError: there is no such quantizer, or one of the capabilities does not support it.
    """
    if name not in ENGINE_QUANTIZERS:
        known = ", ".join(("none", *ENGINE_QUANTIZERS))
        raise StreamlineError(f"quantize {name!r}: unknown for format 'tensorrt'; one of {known}")
    quantizer = ENGINE_QUANTIZERS[name]
    for capability in capabilities:
        if capability < quantizer.min_capability:
            raise StreamlineError(
                f"quantize {name!r}: compute capability {capability} does not support it; it must be at least "
                f"{quantizer.min_capability}"
            )
    return quantizer
