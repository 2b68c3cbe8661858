"""The steps from a checkpoint to an engine: build the graph, lint it, compare it with torch, build the engine.

The graph is compared on ONNX Runtime's CPU, which every machine has; what the engine computes is not compared here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

import onnx_ir as ir
import torch
from transformers import PretrainedConfig, PreTrainedModel

from optimum.exporters.streamline.export_steps import DTYPES, LOG_FILE, check_config, try_few_layers, write_companions
from optimum.exporters.streamline.graph_files import GRAPH_FILE, WEIGHTS_FILE
from optimum.exporters.streamline.onnx.quantization.quantizers import weight_bytes
from optimum.exporters.streamline.onnx.quantization.settings import NONE, Quantization
from optimum.exporters.streamline.parity.calls import answer_with
from optimum.exporters.streamline.parity.compare import TOLERANCES, check_finite, check_parity, measure_divergence
from optimum.exporters.streamline.rewriting.excluded_nodes import check_excluded
from optimum.exporters.streamline.rewriting.public_names import MaskInput
from optimum.exporters.streamline.rewriting.to_float32 import write_float32
from optimum.exporters.streamline.tensorrt.graph.graph_rules import cache_aliases, check_graph
from optimum.exporters.streamline.tensorrt.graph.quantize import quantize_engine_graph
from optimum.exporters.streamline.tensorrt.graph.quantizers import ENGINE_QUANTIZERS, check_engine_quantizer
from optimum.exporters.streamline.tensorrt.graph.reference_runner import StaticOnnxRunner
from optimum.exporters.streamline.tracing.build import BuiltGraph, build_graph
from optimum.streamline.checkpoints.artifact import Artifact
from optimum.streamline.checkpoints.loading import DTYPES as TORCH_DTYPES
from optimum.streamline.checkpoints.loading import load, read_config
from optimum.streamline.checkpoints.record_file import text_of
from optimum.streamline.checkpoints.source import ModelSource, fingerprint
from optimum.streamline.errors import StreamlineError
from optimum.streamline.models.quantization_config import quantization_name
from optimum.streamline.system.atomic_output import staged_folder
from optimum.streamline.system.library_logs import captured_logs
from optimum.streamline.system.progress import Bar, progress_bar
from optimum.streamline.text.windows import seen_text

from .build_engine import BUILDERS, build_engine, open_builder
from .engine_options import EngineOptions, Limits
from .engine_record import ENGINE_FILE, TIMING_FILE, EngineRecord
from .profiles import Axes, axes_of, make_profiles
from .transformers_manifest import FORMAT, write_manifest

STAGES = ("loading", "tracing", "writing", "comparing with torch", "quantizing", "building the engine")


@dataclass(frozen=True)
class TensorrtExport:
    """What to export, and to what.

    Args:
        checkpoint: A checkpoint's folder or Hub id.
        out: The folder to write.
        engine: What to build, and for which GPUs.
        dtype: What weights, cache and masks are in.
        tolerance: Largest logit difference of the graph from torch, as a share of the largest logit.
        quantization: What the graph becomes when it has been proved equal to torch, by a way of `ENGINE_QUANTIZERS`.
        options: `cache_dir`, `trust_remote_code`, `revision`.
    """

    checkpoint: str
    out: Path
    engine: EngineOptions
    dtype: str = "fp32"
    tolerance: float | None = None
    quantization: Quantization | None = None
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
    source = ModelSource(job.checkpoint, **job.options)
    config = read_config(source)
    check_config(config)
    if job.quantization:
        _check_quantization(job.quantization, job.engine, config)
    limits = job.engine.limits(config.max_position_embeddings)
    if quantized := quantization_name(config):
        raise StreamlineError(f"model {job.checkpoint!r}: {quantized} weights cannot be exported to TensorRT")
    with staged_folder(job.out, (job.checkpoint,), overwrite) as folder:
        with captured_logs(folder / LOG_FILE, verbose):
            artifact = _export_into(folder, job, source, limits, trt).with_files(folder)
        artifact.write(folder)
    return artifact


def _check_quantization(quantization: Quantization, engine: EngineOptions, config: PretrainedConfig) -> None:
    major, minor = (0, 0) if engine.capabilities else torch.cuda.get_device_capability()
    way = check_engine_quantizer(quantization.quantizer, engine.capabilities or (10 * major + minor,))
    if way.calibrated and quantization.windows is None:
        raise StreamlineError(f"windows None: quantize {quantization.quantizer!r} needs text to calibrate on")
    check_excluded(config, quantization.exclude)


def _export_into(folder: Path, job: TensorrtExport, source: ModelSource, limits: Limits, trt: ModuleType) -> Artifact:
    with TemporaryDirectory(dir=folder) as scratch, progress_bar("exporting", len(STAGES)) as bar:
        bar.at(0, STAGES[0])
        model = load(source.model, TORCH_DTYPES[job.dtype], offload=Path(scratch) / "weights", **source.options())
        check_finite(model, job.dtype)
        plain = Path(scratch) / "plain" if job.quantization else folder
        plain.mkdir(exist_ok=True)
        proved, whole_because = try_few_layers(
            model, lambda traced: _prove(model, job, limits.length, plain, traced, bar)
        )
        divergence = _quantize(model, job, proved, plain, folder, bar) if job.quantization else {}
        write_companions(model, source, folder)
        write_manifest(folder, type(model).__name__, job.dtype)
        bar.at(len(STAGES) - 1, STAGES[-1])
        record = _build(folder, job, limits, proved, trt)
    record.write(folder)
    return Artifact(
        path=str(job.out),
        format=FORMAT,
        dtype=job.dtype,
        source=job.checkpoint,
        source_fingerprint=fingerprint(source),
        parity=proved.parity,
        traced_layers=proved.traced,
        whole_because=whole_because,
        engine=f"{record.builder} {record.version} for {record.target}, {record.layers} layers in its network",
        quantize=job.quantization.quantizer if job.quantization else NONE,
        quantize_exclude=tuple(job.quantization.exclude) if job.quantization else (),
        divergence=divergence,
        weight_bytes=weight_bytes(folder) if job.quantization else None,
        data=_text_of(job),
    )


def _text_of(job: TensorrtExport) -> dict[str, dict[str, Any]]:
    """What text went into the engine, by purpose."""
    data = dict(text_of(str(ModelSource(job.checkpoint, **job.options).folder)))
    if job.quantization and ENGINE_QUANTIZERS[job.quantization.quantizer].calibrated:
        assert job.quantization.windows is not None
        data["quantization"] = seen_text(job.quantization.windows)
    return data


def _quantize(
    model: PreTrainedModel, job: TensorrtExport, proved: _Proved, plain: Path, folder: Path, bar: Bar
) -> dict[str, float]:
    """Quantize the graph in `plain` into `folder`; returns by how much it then differs from torch."""
    assert job.quantization is not None
    bar.at(4, STAGES[4])
    quantize_engine_graph(plain, folder, job.quantization, proved.masks)
    check_graph(ir.load(folder / GRAPH_FILE))
    with _computable(folder, job.dtype) as there:
        return measure_divergence(model, answer_with(StaticOnnxRunner(there, proved.masks)))


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
        {str(value.name): axes_of(value) for value in graph.inputs},
        {str(written.name): str(read.name) for written, read in cache_aliases(graph).items()},
        built.masks,
    )


def _compare(model: PreTrainedModel, job: TensorrtExport, folder: Path, built: BuiltGraph) -> dict[str, float]:
    """The largest difference from torch, by check."""
    # In bfloat16 torch is widened as the graph is. Its constants are rounded, so it is held to half precision.
    narrow = job.dtype == "bf16"
    tolerance = TOLERANCES["fp16" if narrow else job.dtype] if job.tolerance is None else job.tolerance
    reference = load(job.checkpoint, torch.bfloat16, **job.options).float() if narrow else model
    with _computable(folder, job.dtype) as there:
        return check_parity(reference, answer_with(StaticOnnxRunner(there, built.masks)), tolerance)


@contextmanager
def _computable(folder: Path, dtype: str) -> Iterator[Path]:
    """A folder of the same graph that ONNX Runtime's CPU can compute, which is in float for one in bfloat16."""
    if dtype != "bf16":
        yield folder
        return
    with TemporaryDirectory(dir=folder) as scratch:
        write_float32(folder / GRAPH_FILE, Path(scratch) / GRAPH_FILE)
        yield Path(scratch)


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
