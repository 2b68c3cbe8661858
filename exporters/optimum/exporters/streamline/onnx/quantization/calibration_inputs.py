"""What a graph is fed to calibrate on text: windows of tokens, each from its beginning."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnxruntime.quantization import CalibrationDataReader

from optimum.exporters.streamline.onnx.runner import token_inputs

InputArrays = dict[str, npt.NDArray[Any]]


def calibration_inputs(model: onnx.ModelProto, windows: npt.NDArray[np.int64]) -> Iterator[InputArrays]:
    """The inputs of each window, `[windows, length]`, in turn."""
    caches = [value for value in model.graph.input if value.name.startswith("past_key_values.")]
    empty = {value.name: np.empty(_empty_shape(value), np.float32) for value in caches}
    for window in windows:
        tokens = window[None]
        yield {**token_inputs(tokens, np.ones_like(tokens)), **empty}


def _empty_shape(value: onnx.ValueInfoProto) -> tuple[int, ...]:
    _, heads, _, size = (axis.dim_value for axis in value.type.tensor_type.shape.dim)
    return (1, heads, 0, size)


class CalibrationReader(CalibrationDataReader):
    """The same, one after another, as ONNX Runtime's calibration asks for them."""

    def __init__(self, feeds: Iterator[InputArrays]) -> None:
        self._feeds = feeds

    def get_next(self) -> InputArrays | None:
        """The next window's; nothing when all were given."""
        return next(self._feeds, None)
