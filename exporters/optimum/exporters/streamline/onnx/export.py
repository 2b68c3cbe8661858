"""The steps from a checkpoint to a proved ONNX folder, in order: build, write, compare, or nothing.

A graph to be quantized is proved first, as any; what quantizing it changed is measured, not judged.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from optimum.exporters.streamline.export_steps import (
    DTYPES,
    LOG_FILE,
    check_config,
    check_packages,
    try_few_layers,
    write_companions,
)
from optimum.exporters.streamline.graph_files import GRAPH_FILE, WEIGHTS_FILE
from optimum.exporters.streamline.onnx.quantization.quantizers import GRAPH_QUANTIZERS, check_quantization, weight_bytes
from optimum.exporters.streamline.onnx.quantization.settings import NONE, Quantization
from optimum.streamline.checkpoints.artifact import Artifact
from optimum.streamline.errors import ParityError, StreamlineError
from optimum.streamline.system.atomic_output import staged_folder
from optimum.streamline.system.library_logs import captured_logs
from optimum.streamline.system.progress import Bar, progress_bar

from .runner import CannotOpenError, OnnxRunner, provider_of

if TYPE_CHECKING:
    import onnx_ir as ir
    from transformers import PreTrainedModel

    from optimum.exporters.streamline.parity.calls import CallFunction
    from optimum.exporters.streamline.tracing.build import BuiltGraph

FORMAT = "onnx"


STAGES = ("loading", "tracing", "writing", "comparing with torch", "quantizing", "measuring what that changed")


@dataclass(frozen=True)
class OnnxExport:
    """What to export, and to what: the arguments of `export_checkpoint`, documented there."""

    checkpoint: str
    out: Path
    dtype: str = "fp32"
    device: str = "cpu"
    tolerance: float | None = None
    max_memory: int | None = None
    quantization: Quantization | None = None
    last_logits: bool = False
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Proved:
    """A graph that was written and compared with torch: what the fields of `Artifact` of these names say."""

    traced_layers: tuple[int, ...]
    parity: dict[str, float]
    hidden: tuple[str, ...]
    whole_because: str = ""


def export_onnx(job: OnnxExport, overwrite: bool = False, verbose: bool = False) -> Artifact:
    """Export, compare with torch, and only then give the folder its name.

    Raises:
        ParityError: the graph does not compute what the checkpoint does.
        StreamlineError: the job cannot be done as it is given.
    """
    check_options(job.dtype, job.device, job.quantization.how if job.quantization else NONE)
    if job.quantization and GRAPH_QUANTIZERS[job.quantization.how].calibrated and job.quantization.windows is None:
        raise StreamlineError(f"windows None: quantize {job.quantization.how!r} needs text to calibrate on")
    with staged_folder(job.out, (job.checkpoint,), overwrite) as folder:
        with captured_logs(folder / LOG_FILE, verbose):
            artifact = _export_into(folder, job).with_files(folder)
        artifact.write(folder)
    return artifact


def check_options(dtype: str, device: str, quantize: str = NONE) -> None:
    """Refuse a dtype, device or quantization that cannot be exported to here.

    Raises:
        StreamlineError: naming it, or the package that is missing.
    """
    if dtype not in DTYPES:
        raise StreamlineError(f"dtype {dtype!r}: unknown; one of {', '.join(DTYPES)}")
    if dtype == "bf16" and device == "cpu":
        raise StreamlineError(
            "dtype 'bf16': ONNX Runtime's CPU provider cannot compute it, so the export could not be compared "
            "with torch; use 'fp32' or 'fp16', or device 'cuda'"
        )
    if quantize != NONE:
        check_quantization(quantize, dtype)
    check_packages("onnx")
    provider_of(device)


def _export_into(folder: Path, job: OnnxExport) -> Artifact:
    from optimum.exporters.streamline.parity.compare import check_finite
    from optimum.streamline.checkpoints import loading
    from optimum.streamline.checkpoints.source import ModelSource, fingerprint
    from optimum.streamline.models.architectures import active_share
    from optimum.streamline.models.quantization_config import quantization_name
    from optimum.streamline.quantization.dequantize import write_dequantized

    source = ModelSource(job.checkpoint, **job.options)
    config = loading.read_config(source)
    check_config(config)
    if job.quantization:
        from optimum.exporters.streamline.rewriting.excluded_nodes import check_excluded

        check_excluded(config, job.quantization.exclude)
    dequantized = quantization_name(config) or ""
    if dequantized and job.max_memory is not None:
        raise StreamlineError(
            f"max-memory {job.max_memory}: the weights of a quantized checkpoint ({dequantized}) are made float "
            "numbers in memory; leave it out, or export the float model"
        )
    with (
        TemporaryDirectory(dir=folder) as scratch,
        progress_bar("exporting", len(STAGES) if job.quantization else 4) as bar,
    ):
        bar.at(0, STAGES[0])
        if dequantized:
            write_dequantized(source, Path(scratch) / "float")
            source = ModelSource(str(Path(scratch) / "float"))
        model = loading.load(
            source.model, loading.DTYPES[job.dtype], offload=Path(scratch) / "weights", **source.options()
        )
        check_finite(model, job.dtype)
        # Before the graph: what is done last to this folder is to open its graph and compare it.
        write_companions(model, ModelSource(job.checkpoint, **job.options), folder)
        plain = Path(scratch) if job.quantization else folder
        proved = _export_model(model, job, plain, bar)
        divergence = _quantize(model, job, plain, folder, bar) if job.quantization else {}
        read = weight_bytes(folder, active_share(model.config)) if job.quantization else None
        if job.last_logits:
            from .last_logits import keep_last_logits

            keep_last_logits(folder, model.get_output_embeddings().weight.shape[1], job.device)
        error = _dequantized_error(job, folder, bar) if dequantized else {}
    made_from = fingerprint(ModelSource(job.checkpoint, **job.options))
    return Artifact(
        path=str(job.out),
        format=FORMAT,
        dtype=job.dtype,
        source=job.checkpoint,
        source_fingerprint=made_from,
        parity=proved.parity,
        traced_layers=proved.traced_layers,
        whole_because=proved.whole_because,
        hidden=proved.hidden,
        quantize=job.quantization.how if job.quantization else NONE,
        divergence=divergence,
        weight_bytes=read,
        quantize_exclude=tuple(job.quantization.exclude) if job.quantization else (),
        last_logits=job.last_logits,
        dequantized=dequantized,
        dequantized_error=error,
        data=_text_of(job),
    )


def _dequantized_error(job: OnnxExport, folder: Path, bar: Bar) -> dict[str, float]:
    """By how much the finished graph differs from a quantized checkpoint."""
    from optimum.exporters.streamline.parity.calls import answer_with
    from optimum.exporters.streamline.parity.compare import measure_divergence
    from optimum.streamline.checkpoints import loading

    bar.at(3, STAGES[3])
    model = loading.load(job.checkpoint, **job.options)
    return measure_divergence(model, answer_with(OnnxRunner(folder, job.device)))


def _text_of(job: OnnxExport) -> dict[str, dict[str, Any]]:
    """What text went into the artifact's weights, by purpose."""
    from optimum.streamline.checkpoints.record_file import text_of
    from optimum.streamline.checkpoints.source import ModelSource
    from optimum.streamline.text.windows import seen_text

    data = dict(text_of(str(ModelSource(job.checkpoint, **job.options).folder)))
    if job.quantization and GRAPH_QUANTIZERS[job.quantization.how].calibrated:
        assert job.quantization.windows is not None
        data["quantization"] = seen_text(job.quantization.windows)
    return data


def _quantize(model: PreTrainedModel, job: OnnxExport, plain: Path, folder: Path, bar: Bar) -> dict[str, float]:
    """Quantize the graph in `plain` into `folder`; returns by how much it then differs from torch."""
    from optimum.exporters.streamline.parity.calls import answer_with
    from optimum.exporters.streamline.parity.compare import measure_divergence

    from .genai_config import CONFIG_FILE

    assert job.quantization is not None
    bar.at(4, STAGES[4])
    GRAPH_QUANTIZERS[job.quantization.how].run(plain, folder, job.quantization)
    (folder / CONFIG_FILE).write_bytes((plain / CONFIG_FILE).read_bytes())
    bar.at(5, STAGES[5])
    return measure_divergence(model, answer_with(OnnxRunner(folder, job.device)))


def _export_model(model: PreTrainedModel, job: OnnxExport, folder: Path, bar: Bar) -> _Proved:
    """Write a graph that is proved equal to `model`."""
    proved, whole_because = try_few_layers(model, lambda traced: _export_traced(model, job, folder, traced, bar))
    return replace(proved, whole_because=whole_because)


def _export_traced(model: PreTrainedModel, job: OnnxExport, folder: Path, traced: list[int], bar: Bar) -> _Proved:
    from optimum.exporters.streamline.parity.compare import TOLERANCES, check_parity
    from optimum.exporters.streamline.tracing.build import build_graph

    bar.at(1, STAGES[1])
    built = build_graph(model, traced)
    bar.at(2, STAGES[2])
    write_graph(built.model, model, folder)
    bar.at(3, STAGES[3])
    tolerance = TOLERANCES[job.dtype] if job.tolerance is None else job.tolerance
    try:
        parity = check_parity(model, _answer(folder, built, job), tolerance)
    except CannotOpenError as error:
        raise ParityError(f"parity: ONNX Runtime cannot open the graph ({error.reason})") from None
    return _Proved(tuple(traced), parity, built.states)


def _answer(folder: Path, built: BuiltGraph, job: OnnxExport) -> CallFunction:
    """What answers for the graph: a session on the whole of it, or on a few layers after another if it is too large."""
    from optimum.exporters.streamline.parity.calls import answer_with

    from .memory import IN_RUNTIME, free_memory, taken_memory
    from .segmented_runner import SegmentedRunner

    free = free_memory() if job.max_memory is None else job.max_memory - taken_memory()
    weights = (folder / WEIGHTS_FILE).stat().st_size
    if IN_RUNTIME * weights <= free or (not built.hidden and job.max_memory is None):
        return answer_with(OnnxRunner(folder, job.device))
    if not built.hidden:
        raise StreamlineError(
            f"max-memory {job.max_memory}: the layers of this model are not parts that can be run one by one, and all "
            f"of them take up to {IN_RUNTIME * weights + taken_memory()} bytes"
        )
    hidden = [str(value.name) for value in built.hidden]
    return SegmentedRunner(folder, hidden, free // IN_RUNTIME, job.device).answer


def write_graph(graph: ir.Model, model: PreTrainedModel, folder: Path) -> None:
    """Write `model.onnx`, its weights beside it, and what GenAI needs to know of them."""
    import onnx_ir as ir

    from .genai_config import write_genai_config

    ir.save(graph, folder / GRAPH_FILE, external_data=WEIGHTS_FILE)
    write_genai_config(model, graph, folder)
