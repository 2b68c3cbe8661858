"""Opening a checkpoint or an export in the runtime it belongs to."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from optimum.streamline.checkpoints.artifact import Artifact, is_artifact
from optimum.streamline.errors import StreamlineError

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
    """Open a checkpoint (torch) or an artifact (its own runtime) for running.

    Args:
        path: A checkpoint's folder or Hub id, or an artifact's folder.
        dtype: What a checkpoint is computed in; an artifact, and a quantized checkpoint, has its own.
        cache_dir: Where Hub downloads are kept; transformers' own place by default.
        trust_remote_code: Whether code from a checkpoint may run.
        revision: A branch, tag or commit of a Hub repository.
        tensorrt: As in `optimum.exporters.streamline.open_artifact`, for an ONNX export.

    Raises:
        StreamlineError: it cannot be opened so.
    """
    if is_artifact(path):
        from optimum.exporters.streamline import open_artifact

        return open_artifact(Artifact.read(Path(path)), device, tensorrt)
    if tensorrt is not None:
        raise StreamlineError(f"tensorrt: {path!r} is a checkpoint; export it, to ONNX or to TensorRT itself")
    from optimum.streamline.checkpoints.loading import DTYPES, load
    from optimum.streamline.models.quantized_weights import enable_cpu_kernel

    from .torch_runner import TorchRunner

    model = load(
        path, DTYPES[dtype], device, cache_dir=cache_dir, trust_remote_code=trust_remote_code, revision=revision
    )
    enable_cpu_kernel(model)  # as in stock transformers: nothing is saved from here
    return TorchRunner(model)
