"""`open_runner`: open a checkpoint in torch, or an artifact in its own runtime."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from optimum.streamline.errors import StreamlineError
from optimum.streamline.model_files.artifact import Artifact, is_artifact

from .runner import Runner

if TYPE_CHECKING:
    from optimum.exporters.streamline import EngineOptions


def open_runner(
    path: str,
    dtype: str = "fp32",
    device: str = "cpu",
    cache_dir: str | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
    tensorrt: EngineOptions | None = None,
) -> Runner:
    """Open a checkpoint in torch, or an artifact in its own runtime.

    Args:
        path: The folder or Hub id of a checkpoint, or the folder of an artifact.
        dtype: The dtype that a float checkpoint computes in: `fp32`, `fp16` or `bf16`. Artifacts and quantized
            checkpoints have their own.
        device: `cpu` or `cuda`.
        cache_dir: The folder for Hub downloads; by default transformers' own.
        trust_remote_code: Whether Python code in the checkpoint may run.
        revision: A branch, tag or commit of a Hub repository.
        tensorrt: Run an ONNX artifact in TensorRT, with these options (`optimum.exporters.streamline.open_artifact`).

    Raises:
        StreamlineError: the model cannot be opened with these options.
    """
    if is_artifact(path):
        from optimum.exporters.streamline import open_artifact

        return open_artifact(Artifact.read(Path(path)), device, tensorrt)
    if tensorrt is not None:
        raise StreamlineError(f"tensorrt: {path!r} is a checkpoint; export it to ONNX or TensorRT first")
    from optimum.streamline.checkpoints.loading import DTYPES, load
    from optimum.streamline.models.quantized_weights import enable_cpu_kernel

    from .torch_runner import TorchRunner

    model = load(
        path, DTYPES[dtype], device, cache_dir=cache_dir, trust_remote_code=trust_remote_code, revision=revision
    )
    enable_cpu_kernel(model)  # faster, and allowed because this model is never saved
    return TorchRunner(model)
