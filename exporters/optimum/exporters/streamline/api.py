"""The functions that a caller of the exporters uses: export a checkpoint, check an export beforehand, open an export.

Importing this file is cheap: each function imports torch, transformers or a runtime only when it needs them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimum.exporters.streamline.onnx.quantization.settings import NONE, Quantization
from optimum.exporters.streamline.tensorrt.engine_options import EngineOptions
from optimum.exporters.streamline.tensorrt.graph.quantizers import check_engine_quantizer
from optimum.streamline.errors import StreamlineError
from optimum.streamline.model_files.artifact import Artifact
from optimum.streamline.runtime.runner import Logits, Runner, TokenIds

if TYPE_CHECKING:
    from optimum.streamline.text.windows import Windows

ONNX, TENSORRT = FORMATS = ("onnx", "tensorrt")
_ONNX_ONLY_DEFAULTS: dict[str, Any] = {"device": "cpu", "max_memory": None, "last_logits": False}


def export_checkpoint(
    checkpoint: str,
    out: Path,
    format: str = "onnx",  # noqa: A002 -- the command's name for it
    dtype: str = "fp32",
    device: str = "cpu",
    overwrite: bool = False,
    tolerance: float | None = None,
    verbose: bool = False,
    max_memory: int | None = None,
    quantize: str = NONE,
    quantize_exclude: Sequence[str] = (),
    windows: Windows | None = None,
    last_logits: bool = False,
    engine: EngineOptions | None = None,
    **options: Any,
) -> Artifact:
    """Export a checkpoint into the folder `out`; the folder is written only if the export agrees with torch.

    Args:
        checkpoint: The checkpoint: a folder or a Hub id.
        out: The folder to write. The files are written beside it under a temporary name, which is then changed.
        format: `onnx` or `tensorrt`.
        dtype: `fp32`, `fp16` or `bf16`: the type of weights, caches and logits. An ONNX graph in `bf16` needs device
            `cuda`, and its logits are fp32.
        device: For `onnx`: `cpu` or `cuda`, where the graph runs to be compared with torch.
        overwrite: Whether to replace `out` if it exists.
        tolerance: The largest difference of a logit from torch that is allowed, as a share of the largest logit; by
            default `parity.compare.TOLERANCES[dtype]`.
        verbose: Whether messages of torch and transformers go to the terminal and not to `export.log`.
        max_memory: For `onnx`: the memory to use, in bytes; by default all that is free. The weights stay on disk, and
            the graph is compared with torch a few layers at a time. At least two layers, and about five times the
            largest weight, are needed even so.
        quantize: The quantizer to apply after the comparison with torch: a key of `GRAPH_QUANTIZERS`, for `tensorrt`
            of `ENGINE_QUANTIZERS`, or `none`.
        quantize_exclude: The modules to leave in float: layer indices of the checkpoint, or module names in which `*`
            stands for any text.
        windows: The calibration text, for a quantizer that needs one.
        last_logits: For `onnx`: whether the graph returns the logits of each row's last token only, which shortens
            the prefill of a client that generates text. With the input `num_logits_to_keep` set to 0 it returns all.
        engine: For `tensorrt`: the engine to build.
        options: `cache_dir`, `trust_remote_code`, `revision`, as in `ModelSource`.

    Returns:
        The artifact, with its measured differences from torch.

    Raises:
        ParityError: the export does not compute what the checkpoint does.
        StreamlineError: the checkpoint, `out` or an option cannot be used, or a package is missing.
    """
    _check_format(format)
    quantization = None if quantize == NONE else Quantization(quantize, tuple(quantize_exclude), windows)
    if format == TENSORRT:
        _refuse_for_tensorrt(device=device, max_memory=max_memory, last_logits=last_logits)
        from .export_steps import check_packages

        check_packages(TENSORRT)
        from optimum.exporters.streamline.tensorrt.export import TensorrtExport, export_tensorrt

        engine = engine or EngineOptions()
        tensorrt_job = TensorrtExport(checkpoint, out, engine, dtype, tolerance, quantization, options)
        return export_tensorrt(tensorrt_job, overwrite, verbose)
    if engine is not None:
        raise StreamlineError(f"builder {engine.builder!r}: format {format!r} has no engine; leave it out")
    from optimum.exporters.streamline.onnx.export import OnnxExport, export_onnx

    job = OnnxExport(checkpoint, out, dtype, device, tolerance, max_memory, quantization, last_logits, options)
    return export_onnx(job, overwrite, verbose)


def check_export(
    format: str,  # noqa: A002 -- the command's name for it
    dtype: str,
    device: str,
    quantize: str = NONE,
    engine: EngineOptions | None = None,
) -> None:
    """Refuse an export that this machine cannot make, before any work is done.

    Args:
        format: `onnx` or `tensorrt`.
        dtype: As in `export_checkpoint`.
        device: As in `export_checkpoint`.
        quantize: As in `export_checkpoint`.
        engine: For `tensorrt`: the engine to build, if it is already known.

    Raises:
        StreamlineError: the format, dtype, device or quantizer cannot be used, or a package is missing.
    """
    _check_format(format)
    if format == TENSORRT:
        _refuse_for_tensorrt(device=device)
        if quantize != NONE:
            check_engine_quantizer(quantize, engine.capabilities if engine else ())
        return
    from optimum.exporters.streamline.onnx.export import check_options

    check_options(dtype, device, quantize)


def open_artifact(artifact: Artifact, device: str = "cpu", tensorrt: EngineOptions | None = None) -> Runner:
    """Open an exported model for running.

    Args:
        artifact: The export.
        device: `cpu` or `cuda`; an engine needs `cuda`.
        tensorrt: For an ONNX export on `cuda`: run it on ONNX Runtime's TensorRT provider. The provider builds engines
            for requests up to these limits, and keeps them in the artifact's folder. `builder` and `capabilities` are
            ignored.

    Returns:
        A runner: `prefill` and `decode`.

    Raises:
        StreamlineError: the runtime is not installed, or does not support the device.
    """
    _check_format(artifact.format)
    if artifact.format == TENSORRT:
        if device != "cuda":
            raise StreamlineError(f"device {device!r}: an engine runs on a GPU; give device 'cuda'")
        from optimum.exporters.streamline.tensorrt.runner import TensorrtRunner

        return TensorrtRunner(Path(artifact.path))
    if tensorrt is not None:
        if device != "cuda":
            raise StreamlineError(f"device {device!r}: TensorRT runs on a GPU; give device 'cuda'")
        from optimum.exporters.streamline.tensorrt.ort_provider import TensorrtProviderRunner

        return TensorrtProviderRunner(Path(artifact.path), tensorrt)
    from optimum.exporters.streamline.onnx.runner import OnnxRunner

    return OnnxRunner(Path(artifact.path), device)


def open_hidden_states(artifact: Artifact, device: str = "cpu") -> Callable[[TokenIds], list[Logits]]:
    """Open an ONNX export for reading its hidden states.

    Args:
        artifact: An export to ONNX.
        device: `cpu` or `cuda`.

    Returns:
        A function from token ids `[batch, length]` to one array `[batch, length, width]` before the first layer and
        one after each layer.

    Raises:
        StreamlineError: the export is not ONNX, its layers are not separable parts of the graph, or as
            `open_artifact`.
    """
    if artifact.format != ONNX:
        raise StreamlineError(f"format {artifact.format!r}: has no hidden states to read; give an export to {ONNX}")
    from optimum.exporters.streamline.onnx.hidden_states import open_hidden_states as open_states

    return open_states(artifact, device)


def _refuse_for_tensorrt(**values: Any) -> None:
    """Refuse an option of ONNX exports that is not at its default."""
    for name, value in values.items():
        if value != _ONNX_ONLY_DEFAULTS[name]:
            raise StreamlineError(f"{name.replace('_', '-')} {value}: format 'tensorrt' cannot do it; leave it out")


def _check_format(name: str) -> None:
    if name not in FORMATS:
        raise StreamlineError(f"format {name!r}: unknown; one of {', '.join(FORMATS)}")
