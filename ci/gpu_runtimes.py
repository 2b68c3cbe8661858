"""The exported models of `ci/bench gpu`: TensorRT's engines where its library is, otherwise ONNX Runtime's graphs.

Timed as a client is served: tokens in host memory in, logits in host memory out. So the shape is one whose prompt's
logits, which are copied, do not drown what is measured.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from gpu_cases import Plan, Shape, kept_layers
from optimum.exporters.streamline import EngineOptions, export_checkpoint, open_artifact
from optimum.exporters.streamline.onnx.quantization.quantizers import weight_bytes

LIBRARIES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
ONNX = "onnxruntime"


@dataclass(frozen=True)
class Exported:
    """A model in its runtime.

    Args:
        runner: Takes prompts and tokens.
        layers: Decoder layers.
        stored: Bytes of all weights.
        read: Bytes of the weights that a token is multiplied by.
    """

    runner: Any
    layers: int
    stored: int
    read: int


def runtime_here(device: str) -> str:
    """TensorRT where its library is and a GPU, otherwise ONNX Runtime."""
    present = [name for name, module in LIBRARIES.items() if importlib.util.find_spec(module)]
    return present[0] if present and device == "cuda" else ONNX


def build_exported(checkpoints: dict[str, Any], shape: Shape, runtime: str, plan: Plan, device: str) -> dict[str, Any]:
    """`dense` and `pruned` of a runtime, each exported and compared with torch.

    Args:
        checkpoints: torch models, by the same names, which are given up.
        runtime: As `runtime_here` says.
    """
    made = {}
    with TemporaryDirectory() as scratch:
        for name in ("dense", "pruned"):
            model = checkpoints.pop(name).to(torch.float16 if device == "cuda" else torch.float32)
            folder = Path(scratch) / name
            model.save_pretrained(folder / "checkpoint")
            layers = shape.layers if name == "dense" else kept_layers(shape)
            del model
            made[name] = _opened(folder, layers, runtime, plan, device)
    return made


def _opened(folder: Path, layers: int, runtime: str, plan: Plan, device: str) -> Exported:
    dtype = "fp16" if device == "cuda" else "fp32"
    options: dict[str, Any] = {"device": device}
    if runtime in LIBRARIES:
        room = plan.prompt + plan.room
        options = {"engine": EngineOptions(runtime, (), max(plan.batches), room, plan.prompt)}
    form = "tensorrt" if runtime in LIBRARIES else "onnx"
    artifact = export_checkpoint(str(folder / "checkpoint"), folder / "out", form, dtype, **options)
    stored = (folder / "out" / "model.onnx.data").stat().st_size
    return Exported(open_artifact(artifact, device), layers, stored, weight_bytes(folder / "out"))
