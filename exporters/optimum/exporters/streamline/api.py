"""Exporting a checkpoint to a runtime, and opening what was exported: `Artifact` in, `Runner` out.

Importing this package is cheap: torch and transformers are imported by an export, a runtime by opening one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimum.exporters.streamline.onnx.quantization.settings import NONE, Quantization
from optimum.exporters.streamline.tensorrt.engine_options import EngineOptions
from optimum.exporters.streamline.tensorrt.graph.quantizers import check_engine_quantizer
from optimum.streamline.checkpoints.artifact import Artifact
from optimum.streamline.errors import StreamlineError
from optimum.streamline.runtime.runner import Logits, Runner, TokenIds

if TYPE_CHECKING:
    from optimum.streamline.text.windows import Windows

ONNX, TENSORRT = FORMATS = ("onnx", "tensorrt")
_OF_ONNX_ALONE: dict[str, Any] = {"device": "cpu", "max_memory": None, "last_logits": False}


def export_checkpoint(
    checkpoint: str,
    out: Path,
    format: str = "onnx",  # noqa: A002 -- what the command calls it
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
    """Export a checkpoint into the folder `out`, proved equal to torch, or not at all.

    Args:
        checkpoint: A checkpoint's folder or Hub id.
        out: The folder to write: beside its name, then renamed.
        format: `onnx`, or `tensorrt`, of which what is said below of memory and last logits does not hold.
        dtype: `fp32`, `fp16`, or on `cuda` `bf16`: what weights, cache and logits are in (fp32 logits with `bf16`).
        device: `cpu` or `cuda`: where the export runs to be compared with torch.
        overwrite: Whether `out` may exist.
        tolerance: Largest logit difference from torch allowed, as a share of the largest logit;
            the default is `compare.TOLERANCES` of the dtype.
        verbose: Whether what torch and transformers say goes to the terminal rather than to `export.log`.
        max_memory: Bytes of memory to make do with, though never with less than two layers take, or about five times
            the largest weight: the weights stay on disk, and the graph is compared with torch a few layers at a time.
            By default what is free.
        quantize: How to quantize the graph once it has been compared with torch: a key of `GRAPH_QUANTIZERS`, or for
            `tensorrt` of `ENGINE_QUANTIZERS`.
        quantize_exclude: What to leave in float: numbers of the checkpoint's layers, and names of modules in which `*`
            stands for anything.
        windows: Text to calibrate on, for a way to quantize that does.
        last_logits: Whether the graph, left to itself, gives the logits of each row's last token only: a shorter
            prefill for a client that generates. Fed 0 as `num_logits_to_keep` it gives all.
        engine: What engine to build, for `tensorrt`.
        options: `cache_dir`, `trust_remote_code`, `revision`.

    Returns:
        The artifact, with the differences from torch that were measured.

    Raises:
        ParityError: the export does not compute what the checkpoint does.
        StreamlineError: the checkpoint, `out`, or an option cannot be used, or a package is missing.
    """
    _check_format(format)
    quantization = None if quantize == NONE else Quantization(quantize, tuple(quantize_exclude), windows)
    if format == TENSORRT:
        _refuse_for_tensorrt(device=device, max_memory=max_memory, last_logits=last_logits)
        from .export_steps import check_packages

        check_packages(TENSORRT)
        from optimum.exporters.streamline.tensorrt.export import TensorrtExport, export_tensorrt

        built = TensorrtExport(checkpoint, out, engine or EngineOptions(), dtype, tolerance, quantization, options)
        return export_tensorrt(built, overwrite, verbose)
    if engine is not None:
        raise StreamlineError(f"builder {engine.builder!r}: format {format!r} has no engine; leave it out")
    from optimum.exporters.streamline.onnx.export import OnnxExport, export_onnx

    job = OnnxExport(checkpoint, out, dtype, device, tolerance, max_memory, quantization, last_logits, options)
    return export_onnx(job, overwrite, verbose)


def check_export(
    format: str,  # noqa: A002 - the command's word
    dtype: str,
    device: str,
    quantize: str = NONE,
    engine: EngineOptions | None = None,
) -> None:
    """Refuse what cannot be exported here, before anything is made to be exported.

    Args:
        engine: What engine is asked for, where one is and that is known already.

    Raises:
        StreamlineError: the format, dtype or device is wrong, or a package is missing.
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
        device: `cpu` or `cuda`.
        tensorrt: Have ONNX Runtime's TensorRT provider run an ONNX export on a GPU, by engines that are built for
            requests up to these and kept in the artifact's folder; `builder` and `capabilities` say nothing then.

    Raises:
        StreamlineError: its runtime is not installed, or lacks the device.
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
    """What gives, for tokens `[batch, length]`, the hidden states `[batch, length, width]` around each layer.

    Raises:
        StreamlineError: the layers are no parts of the graph; or as `open_artifact`.
    """
    if artifact.format != ONNX:
        raise StreamlineError(f"format {artifact.format!r}: has no hidden states to read; give an export to {ONNX}")
    from optimum.exporters.streamline.onnx.hidden_states import open_hidden_states as open_states

    return open_states(artifact, device)


def _refuse_for_tensorrt(**given: Any) -> None:
    for name, value in given.items():
        if value != _OF_ONNX_ALONE[name]:
            raise StreamlineError(f"{name.replace('_', '-')} {value}: format 'tensorrt' cannot do it; leave it out")


def _check_format(name: str) -> None:
    if name not in FORMATS:
        raise StreamlineError(f"format {name!r}: unknown; one of {', '.join(FORMATS)}")
