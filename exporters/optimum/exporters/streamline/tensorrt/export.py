"""Export a checkpoint to TensorRT: trace the graph, check its rules, compare it with torch, and build the engine.

The comparison runs the graph on ONNX Runtime's CPU, so it needs no GPU. The engine itself is not compared with torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

import onnx_ir as ir
import torch
from transformers import PretrainedConfig, PreTrainedModel

from optimum.exporters.streamline.export_steps import DTYPES, LOG_FILE, check_config, try_few_layers, write_companions
from optimum.exporters.streamline.graph_files import GRAPH_FILE, WEIGHTS_FILE, weight_bytes
from optimum.exporters.streamline.onnx.export import IN_RUNTIME
from optimum.exporters.streamline.onnx.quantization.settings import NONE, Quantization
from optimum.exporters.streamline.onnx.segmented_runner import SegmentedRunner
from optimum.exporters.streamline.parity.compare import TOLERANCES, check_finite, check_parity, measure_divergence
from optimum.exporters.streamline.parity.model_calls import CallFunction, answer_with
from optimum.exporters.streamline.rewriting.excluded_nodes import check_excluded
from optimum.exporters.streamline.rewriting.public_names import MaskInput
from optimum.exporters.streamline.rewriting.to_float32 import write_float32
from optimum.exporters.streamline.tensorrt.graph.graph_rules import cache_aliases, check_graph
from optimum.exporters.streamline.tensorrt.graph.insert_qdq import quantize_engine_graph
from optimum.exporters.streamline.tensorrt.graph.quantizers import ENGINE_QUANTIZERS, check_engine_quantizer
from optimum.exporters.streamline.tensorrt.graph.reference_runner import StaticInputs, StaticOnnxRunner
from optimum.exporters.streamline.tracing.build import build_graph
from optimum.streamline.checkpoints.loading import DTYPES as TORCH_DTYPES
from optimum.streamline.checkpoints.loading import load, only_dtype, read_config
from optimum.streamline.checkpoints.record_file import recorded_text
from optimum.streamline.errors import StreamlineError
from optimum.streamline.model_files.artifact import Artifact
from optimum.streamline.model_files.source import ModelSource, fingerprint
from optimum.streamline.models.offloaded_weights import read_as, read_parameter, write_parameter
from optimum.streamline.models.quantization_config import quantization_name
from optimum.streamline.system.atomic_output import staged_folder
from optimum.streamline.system.library_logs import captured_logs
from optimum.streamline.system.memory import free_memory
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
    """One export to TensorRT.

    Args:
        checkpoint: The checkpoint: a folder or a Hub id.
        out: The folder to write.
        engine: The engine to build, and the GPUs to build it for.
        dtype: The type of weights, caches and masks: `fp32`, `fp16` or `bf16`.
        tolerance: The largest difference of a logit from torch that is allowed, as a share of the largest logit; by
            default `parity.compare.TOLERANCES` of the dtype, for `bf16` of `fp16`.
        quantization: The quantization to apply after the comparison with torch, by one of `ENGINE_QUANTIZERS`.
        options: `cache_dir`, `trust_remote_code`, `revision`, as in `ModelSource`.
    """

    checkpoint: str
    out: Path
    engine: EngineOptions
    dtype: str = "fp32"
    tolerance: float | None = None
    quantization: Quantization | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _CheckedGraph:
    """The result of a graph that was written and compared with torch.

    Args:
        traced: The indices of the traced layers.
        parity: The largest absolute logit difference of each check, by its name.
        inputs: The axes of the graph's inputs, by name.
        aliases: For each cache output, the cache input whose memory it shares, by name.
        masks: The mask inputs.
        cuts: The names of the layers' output hidden states, if the graph can be cut there.
    """

    traced: tuple[int, ...]
    parity: dict[str, float]
    inputs: dict[str, Axes]
    aliases: dict[str, str]
    masks: tuple[MaskInput, ...]
    cuts: tuple[str, ...]


def export_tensorrt(job: TensorrtExport, overwrite: bool = False, verbose: bool = False) -> Artifact:
    """Export a checkpoint to TensorRT into `job.out`; the folder appears only if every step succeeds.

    Args:
        job: What to export.
        overwrite: Whether to replace `job.out` if it exists.
        verbose: Whether messages of torch and transformers go to the terminal and not to `export.log`.

    Returns:
        The artifact, with the graph's measured differences from torch.

    Raises:
        ParityError: the graph does not compute what the checkpoint does.
        StreamlineError: the checkpoint, the folder or an option cannot be used, or the builder fails.
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
        raise StreamlineError(
            f"model {job.checkpoint!r}: {quantized} weights cannot be exported to TensorRT; give the float model"
        )
    with staged_folder(job.out, (job.checkpoint,), overwrite) as folder:
        with captured_logs(folder / LOG_FILE, verbose):
            artifact = _export_into(folder, job, source, limits, trt).with_files(folder)
        artifact.write(folder)
    return artifact


def _check_quantization(quantization: Quantization, engine: EngineOptions, config: PretrainedConfig) -> None:
    major, minor = (0, 0) if engine.capabilities else torch.cuda.get_device_capability()
    quantizer = check_engine_quantizer(quantization.quantizer, engine.capabilities or (10 * major + minor,))
    if quantizer.calibrated and quantization.windows is None:
        raise StreamlineError(f"windows None: quantize {quantization.quantizer!r} needs calibration text; give windows")
    check_excluded(config, quantization.exclude)


def _export_into(folder: Path, job: TensorrtExport, source: ModelSource, limits: Limits, trt: ModuleType) -> Artifact:
    with TemporaryDirectory(dir=folder) as scratch, progress_bar("exporting", len(STAGES)) as bar:
        bar.at(0, STAGES[0])
        model = load(source.model, TORCH_DTYPES[job.dtype], offload=Path(scratch) / "weights", **source.options())
        check_finite(model, job.dtype)
        plain = Path(scratch) / "plain" if job.quantization else folder
        plain.mkdir(exist_ok=True)
        checked, whole_because = try_few_layers(
            model, lambda traced: _trace_and_compare(model, job, limits.length, plain, traced, bar)
        )
        divergence = _quantize(model, job, checked, plain, folder, bar) if job.quantization else {}
        write_companions(model, source, folder)
        write_manifest(folder, type(model).__name__, job.dtype)
        bar.at(len(STAGES) - 1, STAGES[-1])
        record = _build(folder, job, limits, checked, trt)
    record.write(folder)
    return Artifact(
        path=str(job.out),
        format=FORMAT,
        dtype=job.dtype,
        source=job.checkpoint,
        source_fingerprint=fingerprint(source),
        parity=checked.parity,
        traced_layers=checked.traced,
        whole_because=whole_because,
        engine=f"{record.builder} {record.version} for {record.target}, {record.layers} layers in its network",
        quantize=job.quantization.quantizer if job.quantization else NONE,
        quantize_exclude=tuple(job.quantization.exclude) if job.quantization else (),
        divergence=divergence,
        weight_bytes=weight_bytes(folder) if job.quantization else None,
        data=_text_of(job),
    )


def _text_of(job: TensorrtExport) -> dict[str, dict[str, Any]]:
    """The text that influenced the engine's weights, by purpose: the checkpoint's record, and this calibration."""
    data = dict(recorded_text(str(ModelSource(job.checkpoint, **job.options).folder)))
    if job.quantization and ENGINE_QUANTIZERS[job.quantization.quantizer].calibrated:
        assert job.quantization.windows is not None
        data["quantization"] = seen_text(job.quantization.windows)
    return data


def _quantize(
    model: PreTrainedModel, job: TensorrtExport, checked: _CheckedGraph, plain: Path, folder: Path, bar: Bar
) -> dict[str, float]:
    """Quantize the graph in `plain` into `folder`; returns its difference from torch (`measure_divergence`)."""
    assert job.quantization is not None
    bar.at(4, STAGES[4])
    quantize_engine_graph(plain, folder, replace(job.quantization, hidden=checked.cuts), checked.masks)
    check_graph(ir.load(folder / GRAPH_FILE))
    with _runnable_on_cpu(folder, job.dtype) as runnable:
        return measure_divergence(model, _answer(runnable, checked.masks, checked.cuts))


def _trace_and_compare(
    model: PreTrainedModel, job: TensorrtExport, length: int, folder: Path, traced: Sequence[int], bar: Bar
) -> _CheckedGraph:
    bar.at(1, STAGES[1])
    built = build_graph(model, traced, length)
    check_graph(built.model)
    bar.at(2, STAGES[2])
    ir.save(built.model, folder / GRAPH_FILE, external_data=WEIGHTS_FILE)
    bar.at(3, STAGES[3])
    cuts = tuple(str(value.name) for value in built.hidden)
    parity = _compare(model, job, folder, built.masks, cuts)
    graph = built.model.graph
    return _CheckedGraph(
        tuple(traced),
        parity,
        {str(value.name): axes_of(value) for value in graph.inputs},
        {str(written.name): str(read.name) for written, read in cache_aliases(graph).items()},
        built.masks,
        cuts,
    )


def _compare(
    model: PreTrainedModel, job: TensorrtExport, folder: Path, masks: tuple[MaskInput, ...], cuts: tuple[str, ...]
) -> dict[str, float]:
    """Compare the graph with torch; returns the largest absolute logit difference of each check, by its name."""
    # A bfloat16 graph is compared in float32, with a torch model whose weights were rounded to bfloat16. The graph's
    # constants are rounded too, so the tolerance is the one of fp16.
    is_bf16 = job.dtype == "bf16"
    tolerance = TOLERANCES["fp16" if is_bf16 else job.dtype] if job.tolerance is None else job.tolerance
    with (
        _runnable_on_cpu(folder, job.dtype) as runnable,
        _rounded_to_bf16(job, folder) if is_bf16 else nullcontext(model) as reference,
    ):
        return check_parity(reference, _answer(runnable, masks, cuts), tolerance)


@contextmanager
def _rounded_to_bf16(job: TensorrtExport, scratch: Path) -> Iterator[PreTrainedModel]:
    """The model with its weights and buffers rounded to bfloat16, computing in float32; its weights stay on disk.

    Args:
        job: The export.
        scratch: A folder with room for the weights, in a folder of their own while the model is used.
    """
    with TemporaryDirectory(dir=scratch) as folder:
        model = load(job.checkpoint, torch.bfloat16, offload=Path(folder), **job.options)
        if only_dtype(ModelSource(job.checkpoint, **job.options)) != torch.bfloat16:
            tied: dict[torch.nn.Parameter, list[str]] = {}
            for name, parameter in model.named_parameters(remove_duplicate=False):
                tied.setdefault(parameter, []).append(name)
            for names in tied.values():  # they are read in bfloat16 now; the files would be read in float32 below
                write_parameter(model, names, read_parameter(model, names[0]))
        read_as(model, torch.float32)
        yield model


def _answer(folder: Path, masks: tuple[MaskInput, ...], cuts: tuple[str, ...]) -> CallFunction:
    """A function that answers calls with the graph: whole, or a few layers at a time if it does not fit in memory."""
    free = free_memory()
    if not cuts or IN_RUNTIME * sum(file.stat().st_size for file in folder.glob(f"{GRAPH_FILE}*")) <= free:
        return answer_with(StaticOnnxRunner(folder, masks))
    inputs = StaticInputs.of_model(ir.load(folder / GRAPH_FILE), masks)
    return SegmentedRunner(folder, cuts, free // IN_RUNTIME, inputs=inputs).answer


@contextmanager
def _runnable_on_cpu(folder: Path, dtype: str) -> Iterator[Path]:
    """A folder with a graph that ONNX Runtime's CPU can run: the same one, or for bfloat16 a copy in float32."""
    if dtype != "bf16":
        yield folder
        return
    with TemporaryDirectory(dir=folder) as scratch:
        write_float32(folder / GRAPH_FILE, Path(scratch) / GRAPH_FILE)
        yield Path(scratch)


def _build(folder: Path, job: TensorrtExport, limits: Limits, checked: _CheckedGraph, trt: ModuleType) -> EngineRecord:
    profiles = make_profiles(checked.inputs, limits)
    timing = None if BUILDERS[job.engine.builder].cross_builds else folder / TIMING_FILE
    earlier_timing = job.out / TIMING_FILE  # in the export that this one replaces, if there is one
    if timing is not None and earlier_timing.is_file():
        timing.write_bytes(earlier_timing.read_bytes())
    build = build_engine(trt, folder / GRAPH_FILE, folder / ENGINE_FILE, profiles, job.engine.capabilities, timing)
    return EngineRecord(
        builder=job.engine.builder,
        version=build.version,
        gpu="" if job.engine.capabilities else torch.cuda.get_device_name(),
        capabilities=job.engine.capabilities,
        limits=limits,
        profiles=profiles,
        aliases=checked.aliases,
        masks=checked.masks,
        layers=build.layers,
    )
