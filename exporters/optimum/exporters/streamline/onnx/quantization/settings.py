"""How a graph is to be quantized: the quantizer, what stays in float, and the calibration text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from optimum.streamline.text.windows import Windows

NONE = "none"


@dataclass(frozen=True)
class Quantization:
    """How to quantize.

    Args:
        how: A key of `GRAPH_QUANTIZERS`.
        exclude: What to leave in float: numbers of the checkpoint's layers, and names of modules as `lm_head` or
            `*.mlp.down_proj`.
        windows: Text to calibrate on, for a way that does.
    """

    how: str
    exclude: Sequence[str] = ()
    windows: Windows | None = None
