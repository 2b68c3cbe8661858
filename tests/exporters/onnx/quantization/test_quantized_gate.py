"""Tests that an export is refused if its quantized graph no longer resembles the model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import numpy_helper

from optimum.exporters.streamline import export_checkpoint
from optimum.exporters.streamline.onnx.quantization.quantizers import GRAPH_QUANTIZERS
from optimum.exporters.streamline.onnx.quantization.settings import Quantization
from optimum.streamline.errors import ParityError
from tiny import wide_model

pytestmark = pytest.mark.onnx


def test_lost_scales_are_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = GRAPH_QUANTIZERS["int4"].run

    def lose_scales(plain: Path, folder: Path, quantization: Quantization) -> Any:
        done = run(plain, folder, quantization)
        model = onnx.load(folder / "model.onnx")
        for tensor in model.graph.initializer:
            if "scale" in tensor.name:
                tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * 0, tensor.name))
        onnx.save(model, folder / "model.onnx", save_as_external_data=True, location="model.onnx.data")
        return done

    wide_model(vocab_size=4096).save_pretrained(tmp_path / "model")
    export_checkpoint(str(tmp_path / "model"), tmp_path / "good", quantize="int4")
    monkeypatch.setitem(GRAPH_QUANTIZERS, "int4", replace(GRAPH_QUANTIZERS["int4"], run=lose_scales))
    with pytest.raises(ParityError, match="differs too much from torch: the logits correlate by"):
        export_checkpoint(str(tmp_path / "model"), tmp_path / "bad", quantize="int4")
    assert not (tmp_path / "bad").exists()
