"""The steps from a checkpoint to an engine: build the graph, lint it, compare it with torch, build the engine.

The graph is compared on ONNX Runtime's CPU, which every machine has; what the engine computes is not compared here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

import onnx_ir as ir
import torch
from transformers import PreTrainedModel

from optimum.streamline import checkpoint
from optimum.streamline.errors import StreamlineError
from optimum.streamline.logs import captured_logs
from optimum.streamline.outputs import staged_folder
from optimum.streamline.progress import Bar, progress_bar
from optimum.streamline.quantization_config import quantization_name
from optimum.streamline.record import text_of
from optimum.streamline.runner import Artifact

from ..build import Built, build_graph
from ..calls import one_by_one
from ..export import DTYPES, LOG_FILE, WEIGHTS_FILE, check_config, from_few_layers, write_companions
from ..ort_runner import GRAPH_FILE
from ..parity import TOLERANCES, check_parity
from ..widen import write_widened
from .builders import BUILDERS, build_engine, open_builder
from .feeds import MaskInput
from .lint import aliases, check_graph
from .options import EngineOptions, Limits
from .ort_static_runner import StaticOnnxRunner
from .profiles import Axes, make_profiles
from .record import ENGINE_FILE, TIMING_FILE, EngineRecord

FORMAT = "tensorrt"
STAGES = ("loading", "tracing", "writing", "comparing with torch", "building the engine")


@dataclass(frozen=True)
class TensorrtExport:
    """What to export, and to what.

    Args:
        checkpoint: A checkpoint's folder or Hub id.
        out: The folder to write.
        engine: What to build, and for which GPUs.
        dtype: What weights, cache and masks are in.
        tolerance: Largest logit difference of the graph from torch, as a share of the largest logit.
        options: `cache_dir`, `trust_remote_code`.
    """

    checkpoint: str
    out: Path
    engine: EngineOptions
    dtype: str = "fp32"
    tolerance: float | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Proved:
    """A graph that was written and compared with torch."""

    traced: tuple[int, ...]
    parity: dict[str, float]
    inputs: dict[str, Axes]
    aliases: dict[str, str]
    masks: tuple[MaskInput, ...]


def export_tensorrt(job: TensorrtExport, overwrite: bool = False, verbose: bool = False) -> Artifact:
    """Export a graph that is proved equal to torch, and the engine of it, or nothing.

    Raises:
        ParityError: the graph does not compute what the checkpoint does.
        StreamlineError: the job cannot be done as it is given, or the builder cannot do it.
    """
    if job.dtype not in DTYPES:
        raise StreamlineError(f"dtype {job.dtype!r}: unknown; one of {', '.join(DTYPES)}")
    trt = open_builder(job.engine.builder, job.engine.capabilities)
    source = checkpoint.Source(job.checkpoint, **job.options)
    config = checkpoint.read_config(source)
    check_config(config)
    limits = job.engine.limits(config.max_position_embeddings)
    if quantized := quantization_name(config):
        raise StreamlineError(f"model {job.checkpoint!r}: {quantized} weights cannot be exported to TensorRT")
    with staged_folder(job.out, (job.checkpoint,), overwrite) as folder:
        with captured_logs(folder / LOG_FILE, verbose):
            artifact = _export_into(folder, job, source, limits, trt)
        artifact.write(folder)
    return artifact


def _export_into(
    folder: Path, job: TensorrtExport, source: checkpoint.Source, limits: Limits, trt: ModuleType
) -> Artifact:
    with TemporaryDirectory(dir=folder) as scratch, progress_bar("exporting", len(STAGES)) as bar:
        bar.at(0, STAGES[0])
        model = checkpoint.load(
            source.model, checkpoint.DTYPES[job.dtype], offload=Path(scratch) / "weights", **source.options()
        )
        proved, whole_because = from_few_layers(
            model, lambda traced: _prove(model, job, limits.length, folder, traced, bar)
        )
        write_companions(model, source, folder)
        bar.at(4, STAGES[4])
        record = _build(folder, job, limits, proved, trt)
    record.write(folder)
    return Artifact(
        path=str(job.out),
        format=FORMAT,
        dtype=job.dtype,
        source=job.checkpoint,
        source_fingerprint=checkpoint.fingerprint(job.checkpoint, job.options.get("cache_dir")),
        parity=proved.parity,
        traced_layers=proved.traced,
        whole_because=whole_because,
        engine=f"{record.builder} {record.version} for {record.target}, {record.layers} layers in its network",
        data=dict(text_of(job.checkpoint)),
    )


def _prove(
    model: PreTrainedModel, job: TensorrtExport, length: int, folder: Path, traced: Sequence[int], bar: Bar
) -> _Proved:
    bar.at(1, STAGES[1])
    built = build_graph(model, traced, length)
    check_graph(built.model)
    bar.at(2, STAGES[2])
    ir.save(built.model, folder / GRAPH_FILE, external_data=WEIGHTS_FILE)
    bar.at(3, STAGES[3])
    parity = _compare(model, job, folder, built)
    graph = built.model.graph
    return _Proved(
        tuple(traced),
        parity,
        {str(value.name): _axes(value) for value in graph.inputs},
        {str(written.name): str(read.name) for written, read in aliases(graph).items()},
        built.masks,
    )


def _axes(value: ir.Value) -> Axes:
    assert value.shape is not None
    return tuple(axis if isinstance(axis, int) else str(axis) for axis in value.shape)


def _compare(model: PreTrainedModel, job: TensorrtExport, folder: Path, built: Built) -> dict[str, float]:
    """The largest difference from torch, by check.

    ONNX Runtime's CPU cannot compute in bfloat16: the graph is widened to float, and so is torch, and both have the
    rounded weights.
    """
    if job.dtype != "bf16":
        tolerance = TOLERANCES[job.dtype] if job.tolerance is None else job.tolerance
        return check_parity(model, one_by_one(StaticOnnxRunner(folder, built.masks)), tolerance)
    tolerance = TOLERANCES["fp16"] if job.tolerance is None else job.tolerance  # its constants are rounded too
    with TemporaryDirectory(dir=folder) as scratch:
        write_widened(folder / GRAPH_FILE, Path(scratch) / GRAPH_FILE)
        rounded = checkpoint.load(job.checkpoint, torch.bfloat16, **job.options).float()
        return check_parity(rounded, one_by_one(StaticOnnxRunner(Path(scratch), built.masks)), tolerance)


def _build(folder: Path, job: TensorrtExport, limits: Limits, proved: _Proved, trt: ModuleType) -> EngineRecord:
    profiles = make_profiles(proved.inputs, limits)
    kept, timing = job.out / TIMING_FILE, None if BUILDERS[job.engine.builder].elsewhere else folder / TIMING_FILE
    if timing is not None and kept.is_file():  # of the export that this one replaces
        timing.write_bytes(kept.read_bytes())
    made = build_engine(trt, folder / GRAPH_FILE, folder / ENGINE_FILE, profiles, job.engine.capabilities, timing)
    return EngineRecord(
        builder=job.engine.builder,
        version=made.version,
        gpu="" if job.engine.capabilities else torch.cuda.get_device_name(),
        capabilities=job.engine.capabilities,
        limits=limits,
        profiles=profiles,
        aliases=proved.aliases,
        masks=proved.masks,
        layers=made.layers,
    )
