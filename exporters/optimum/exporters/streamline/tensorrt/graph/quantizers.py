"""The ways to quantize an engine: one table. Imports nothing heavy: the command line reads it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from optimum.streamline.errors import StreamlineError


@dataclass(frozen=True)
class EngineQuantizer:
    """One way to quantize, always symmetric, which is all that TensorRT takes.

    Args:
        text: What it does, for a user who chooses.
        most: The largest number that it can hold.
        calibrated: Whether activations are quantized too, scaled by what text gave.
        capability: The least compute capability, 89 for 8.9.
        block: How many weights of a column share a scale; 0 for all of them.
    """

    text: str
    most: float
    calibrated: bool = False
    capability: int = 0
    block: int = 0


ENGINE_QUANTIZERS = {
    "int8": EngineQuantizer("weights and activations in 8 bits, scaled by what text gave", 127, calibrated=True),
    "fp8": EngineQuantizer(
        "the same in 8-bit floats, which begin with compute capability 8.9", 448, True, capability=89
    ),
    "int4": EngineQuantizer("weights in 4 bits, blocks of 64 rounded to nearest", 7, block=64),
}


def check_engine_quantizer(how: str, capabilities: Sequence[int]) -> EngineQuantizer:
    """The way of this name, if GPUs of these compute capabilities have it.

    Raises:
        StreamlineError: there is none, or one of them has not.
    """
    if how not in ENGINE_QUANTIZERS:
        raise StreamlineError(f"quantize {how!r}: not of an engine; one of {', '.join(('none', *ENGINE_QUANTIZERS))}")
    way = ENGINE_QUANTIZERS[how]
    for capability in capabilities:
        if capability < way.capability:
            raise StreamlineError(
                f"quantize {how!r}: compute capability {capability} has no such numbers; {way.capability} is the first"
            )
    return way
