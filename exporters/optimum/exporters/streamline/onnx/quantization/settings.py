"""The settings of a quantization: the quantizer, the modules that stay in float, and the calibration text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from optimum.streamline.text.windows import Windows

NONE = "none"


@dataclass(frozen=True)
class Quantization:
    """The settings of a quantization.

    Args:
        quantizer: A key of `GRAPH_QUANTIZERS`, for an engine of `ENGINE_QUANTIZERS`.
        exclude: The modules to leave in float: layer indices of the checkpoint, or module names such as `lm_head` and
            `*.mlp.down_proj`.
        windows: The calibration text, `[windows, length]` tokens; `None` for a quantizer that needs none.
        hidden: The names of the layers' output hidden states, first to last; empty if the
            graph cannot be cut there.
    """

    quantizer: str
    exclude: Sequence[str] = ()
    windows: Windows | None = None
    hidden: Sequence[str] = ()
