"""The inputs of a graph for calibration: each window of the calibration text as one prompt with an empty cache."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnxruntime.quantization import CalibrationDataReader

from optimum.exporters.streamline.onnx.runner import token_inputs

InputArrays = dict[str, npt.NDArray[Any]]
"""The inputs of one call, by name."""


def calibration_inputs(graph: ir.Graph, windows: npt.NDArray[np.int64]) -> Iterator[InputArrays]:
    """Yield the graph's inputs for each window.

    Args:
        graph: The float32 graph, with public names.
        windows: Token ids, `[windows, length]`.
    """
    caches = [value for value in graph.inputs if str(value.name).startswith("past_key_values.")]
    empty = {str(value.name): np.empty(_empty_shape(value), np.float32) for value in caches}
    for window in windows:
        tokens = window[None]
        yield {**token_inputs(tokens, np.ones_like(tokens)), **empty}


def _empty_shape(value: ir.Value) -> tuple[int, ...]:
    assert value.shape is not None
    _, heads, _, size = value.shape
    assert isinstance(heads, int)
    assert isinstance(size, int)
    return (1, heads, 0, size)


class CalibrationReader(CalibrationDataReader):
    """Gives the inputs of calls, one call after another, in the form that ONNX Runtime's calibration reads."""

    def __init__(self, inputs: Iterator[InputArrays]) -> None:
        self._inputs = inputs

    def get_next(self) -> InputArrays | None:
        """The inputs of the next call; `None` after the last."""
        return next(self._inputs, None)
