"""The exported models of `ci/bench gpu`: TensorRT engines if its library is installed, otherwise ONNX graphs.

They are timed as a client sees them, from tokens to logits in host memory. The shape is chosen so that copying the
logits of the prompt takes a small part of the time.
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
from optimum.exporters.streamline.graph_files import weight_bytes

LIBRARIES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
ONNX = "onnxruntime"


@dataclass(frozen=True)
class Exported:
    """An exported model, opened in its runtime.

    Args:
        runner: The runner.
        layers: The number of decoder layers.
        stored: The bytes of all weights.
        read: The bytes of the weights that a token is multiplied by.
    """

    runner: Any
    layers: int
    stored: int
    read: int


def runtime_here(device: str) -> str:
    """The runtime of the exports: TensorRT on a GPU if its library is installed, otherwise ONNX Runtime."""
    present = [name for name, module in LIBRARIES.items() if importlib.util.find_spec(module)]
    return present[0] if present and device == "cuda" else ONNX


def build_exported(checkpoints: dict[str, Any], shape: Shape, runtime: str, plan: Plan, device: str) -> dict[str, Any]:
    """Export and open the models `dense` and `pruned`; each export is compared with torch.

    Args:
        checkpoints: The torch models by name; each is removed from the dictionary to free its memory.
        shape: The dimensions.
        runtime: The runtime, from `runtime_here`.
        plan: The sizes.
        device: `cuda` or `cpu`.
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
