"""Export a checkpoint to ONNX: load it, build and write the graph, compare it with torch, quantize it.

A graph that differs from torch is refused, and then no folder is left. Quantization comes after that comparison; its
effect on the logits is measured and recorded, and only a broken graph is refused.
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
from optimum.exporters.streamline.graph_files import GRAPH_FILE, WEIGHTS_FILE, weight_bytes
from optimum.exporters.streamline.onnx.quantization.quantizers import GRAPH_QUANTIZERS, check_quantizer
from optimum.exporters.streamline.onnx.quantization.settings import NONE, Quantization
from optimum.streamline.errors import ParityError, StreamlineError
from optimum.streamline.model_files.artifact import Artifact
from optimum.streamline.system.atomic_output import staged_folder
from optimum.streamline.system.library_logs import captured_logs
from optimum.streamline.system.memory import free_memory, taken_memory
from optimum.streamline.system.progress import Bar, progress_bar

from .runner import CannotOpenError, OnnxRunner, provider_of

if TYPE_CHECKING:
    import onnx_ir as ir
    from transformers import PreTrainedModel

    from optimum.exporters.streamline.parity.model_calls import CallFunction

FORMAT = "onnx"
IN_RUNTIME = 3
"""An upper bound of the bytes of memory that ONNX Runtime takes per byte of weights, on a CPU.

It keeps the weights as read. Beside them it keeps fp16 weights converted to float32, and float32 weights repacked for
its kernels. Measured: 2.2 for a graph in fp16, 1.5 in fp32; not for quantized graphs.
"""

STAGES = ("loading", "tracing", "writing", "comparing with torch", "quantizing", "measuring what that changed")


@dataclass(frozen=True)
class OnnxExport:
    """One export to ONNX: the arguments of `api.export_checkpoint`, which documents them."""

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
class _CheckedGraph:
    """The result of a graph that was written and compared with torch.

    `cuts` are the names of the layers' output hidden states, if the graph can be cut there. `Artifact` documents the
    other fields.
    """

    traced_layers: tuple[int, ...]
    parity: dict[str, float]
    hidden: tuple[str, ...]
    cuts: tuple[str, ...]
    whole_because: str = ""


def export_onnx(job: OnnxExport, overwrite: bool = False, verbose: bool = False) -> Artifact:
    """Export a checkpoint to ONNX into `job.out`; the folder appears only if the graph agrees with torch.

    Args:
        job: What to export.
        overwrite: Whether to replace `job.out` if it exists.
        verbose: Whether messages of torch and transformers go to the terminal and not to `export.log`.

    Returns:
        The artifact, with its measured differences from torch.

    Raises:
        ParityError: the graph does not compute what the checkpoint does.
        StreamlineError: the checkpoint, the folder or an option cannot be used.
    """
    quantizer = job.quantization.quantizer if job.quantization else NONE
    check_options(job.dtype, job.device, quantizer)
    if job.quantization and GRAPH_QUANTIZERS[quantizer].calibrated and job.quantization.windows is None:
        raise StreamlineError(f"windows None: quantize {quantizer!r} needs calibration text; give windows")
    with staged_folder(job.out, (job.checkpoint,), overwrite) as folder:
        with captured_logs(folder / LOG_FILE, verbose):
            artifact = _export_into(folder, job).with_files(folder)
        artifact.write(folder)
    return artifact


def check_options(dtype: str, device: str, quantize: str = NONE) -> None:
    """Refuse a dtype, device or quantizer that this machine cannot export to.

    Args:
        dtype: `fp32`, `fp16` or `bf16`.
        device: `cpu` or `cuda`.
        quantize: A key of `GRAPH_QUANTIZERS`, or `none`.

    Raises:
        StreamlineError: naming the option and its value, or the missing package.
    """
    if dtype not in DTYPES:
        raise StreamlineError(f"dtype {dtype!r}: unknown; one of {', '.join(DTYPES)}")
    if dtype == "bf16" and device == "cpu":
        raise StreamlineError(
            "dtype 'bf16': ONNX Runtime's CPU provider cannot compute it, so the export could not be compared "
            "with torch; use 'fp32' or 'fp16', or device 'cuda'"
        )
    if quantize != NONE:
        check_quantizer(quantize, dtype)
    check_packages("onnx")
    provider_of(device)


def _export_into(folder: Path, job: OnnxExport) -> Artifact:
    from optimum.exporters.streamline.parity.compare import check_finite
    from optimum.streamline.checkpoints import loading
    from optimum.streamline.model_files.source import ModelSource, fingerprint
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
            f"max-memory {job.max_memory}: a quantized checkpoint ({dequantized}) is dequantized in memory, which may "
            "need more; leave it out, or export the float model"
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
        # Written before the graph, so that the comparison is the last step and sees the finished folder.
        write_companions(model, ModelSource(job.checkpoint, **job.options), folder)
        plain = Path(scratch) if job.quantization else folder
        checked = _export_model(model, job, plain, bar)
        divergence = _quantize(model, job, plain, folder, checked.cuts, bar) if job.quantization else {}
        bytes_read = weight_bytes(folder, active_share(model.config)) if job.quantization else None
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
        parity=checked.parity,
        traced_layers=checked.traced_layers,
        whole_because=checked.whole_because,
        hidden=checked.hidden,
        quantize=job.quantization.quantizer if job.quantization else NONE,
        divergence=divergence,
        weight_bytes=bytes_read,
        quantize_exclude=tuple(job.quantization.exclude) if job.quantization else (),
        last_logits=job.last_logits,
        dequantized=dequantized,
        dequantized_error=error,
        data=_text_of(job),
    )


def _dequantized_error(job: OnnxExport, folder: Path, bar: Bar) -> dict[str, float]:
    """The difference of the finished graph from the quantized checkpoint in torch, as `measure_divergence` gives it."""
    from optimum.exporters.streamline.parity.compare import measure_divergence
    from optimum.exporters.streamline.parity.model_calls import answer_with
    from optimum.streamline.checkpoints import loading

    bar.at(3, STAGES[3])
    model = loading.load(job.checkpoint, **job.options)
    return measure_divergence(model, answer_with(OnnxRunner(folder, job.device)))


def _text_of(job: OnnxExport) -> dict[str, dict[str, Any]]:
    """The text that influenced the artifact's weights, by purpose: the checkpoint's record, and this calibration."""
    from optimum.streamline.checkpoints.record_file import recorded_text
    from optimum.streamline.model_files.source import ModelSource
    from optimum.streamline.text.windows import seen_text

    data = dict(recorded_text(str(ModelSource(job.checkpoint, **job.options).folder)))
    if job.quantization and GRAPH_QUANTIZERS[job.quantization.quantizer].calibrated:
        assert job.quantization.windows is not None
        data["quantization"] = seen_text(job.quantization.windows)
    return data


def _quantize(
    model: PreTrainedModel, job: OnnxExport, plain: Path, folder: Path, cuts: tuple[str, ...], bar: Bar
) -> dict[str, float]:
    """Quantize the graph in `plain` into `folder`; returns its difference from torch (`measure_divergence`)."""
    from optimum.exporters.streamline.parity.compare import measure_divergence

    from .genai_config import CONFIG_FILE

    assert job.quantization is not None
    bar.at(4, STAGES[4])
    GRAPH_QUANTIZERS[job.quantization.quantizer].run(plain, folder, replace(job.quantization, hidden=cuts))
    (folder / CONFIG_FILE).write_bytes((plain / CONFIG_FILE).read_bytes())
    bar.at(5, STAGES[5])
    return measure_divergence(model, _answer(folder, cuts, job))


def _export_model(model: PreTrainedModel, job: OnnxExport, folder: Path, bar: Bar) -> _CheckedGraph:
    """Write the graph of `model` and compare it with torch; trace few layers if that is enough."""
    checked, whole_because = try_few_layers(model, lambda traced: _export_traced(model, job, folder, traced, bar))
    return replace(checked, whole_because=whole_because)


def _export_traced(model: PreTrainedModel, job: OnnxExport, folder: Path, traced: list[int], bar: Bar) -> _CheckedGraph:
    from optimum.exporters.streamline.parity.compare import TOLERANCES, check_parity
    from optimum.exporters.streamline.tracing.build import build_graph

    bar.at(1, STAGES[1])
    built = build_graph(model, traced)
    bar.at(2, STAGES[2])
    write_graph(built.model, model, folder)
    cuts = tuple(str(value.name) for value in built.hidden)
    bar.at(3, STAGES[3])
    tolerance = TOLERANCES[job.dtype] if job.tolerance is None else job.tolerance
    try:
        parity = check_parity(model, _answer(folder, cuts, job), tolerance)
    except CannotOpenError as error:
        raise ParityError(f"parity: ONNX Runtime cannot open the graph ({error.reason})") from None
    return _CheckedGraph(tuple(traced), parity, built.states, cuts)


def _answer(folder: Path, cuts: tuple[str, ...], job: OnnxExport) -> CallFunction:
    """A function that answers calls with the graph: whole, or a few layers at a time if it does not fit in memory."""
    from optimum.exporters.streamline.parity.model_calls import answer_with

    from .segmented_runner import SegmentedRunner

    free = free_memory() if job.max_memory is None else job.max_memory - taken_memory()
    weights = sum(file.stat().st_size for file in folder.glob(f"{GRAPH_FILE}*"))
    if IN_RUNTIME * weights <= free or (not cuts and job.max_memory is None):
        return answer_with(OnnxRunner(folder, job.device))
    if not cuts:
        raise StreamlineError(
            f"max-memory {job.max_memory}: the layers of this model cannot be run one by one; give "
            f"{IN_RUNTIME * weights + taken_memory()} bytes, which the whole model may take"
        )
    return SegmentedRunner(folder, cuts, free // IN_RUNTIME, job.device).answer


def write_graph(graph: ir.Model, model: PreTrainedModel, folder: Path) -> None:
    """Write `model.onnx`, `model.onnx.data` with the weights, and `genai_config.json`.

    Args:
        graph: The graph, with public names.
        model: The model that it was traced from.
        folder: The folder to write into.
    """
    import onnx_ir as ir

    from .genai_config import write_genai_config

    ir.save(graph, folder / GRAPH_FILE, external_data=WEIGHTS_FILE)
    write_genai_config(model, graph, folder)
