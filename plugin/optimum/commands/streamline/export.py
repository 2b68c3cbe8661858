"""`optimum-cli streamline export`: its flags, and what it does with them."""

from __future__ import annotations

import argparse
from argparse import Namespace
from typing import TYPE_CHECKING, Any

from optimum.commands.base import CommandInfo

from .base import Command
from .options import (
    CHOOSING_TEXT,
    ENGINE_QUANTIZATION_LINES,
    QUANTIZATION_LINES,
    SPEC,
    add_exclude_flag,
    add_model_flags,
    add_output_flags,
)

if TYPE_CHECKING:
    from rich.console import Console

    from optimum.exporters.streamline import EngineOptions
    from optimum.streamline.text.windows import Windows

# Of an export's calibration, which is for those of its quantizers that take one.
CALIBRATION_DEFAULTS: dict[str, Any] = {"calibration": CHOOSING_TEXT, "samples": 32, "length": 256, "seed": 0}


OPSETS = {"onnx": 23, "tensorrt": 24}


ENGINE_FLAGS = ("builder", "compute_capability", "max_batch", "max_length", "max_input")


class ExportCommand(Command):
    """`optimum-cli streamline export`."""

    COMMAND = CommandInfo(name="export", help="Export a checkpoint, checked against torch.")

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        """Flags of `export`."""
        from optimum.streamline.recipe.recipe import CHOOSING_TEXT

        Command.parse_args(parser)
        add_model_flags(parser)
        add_output_flags(parser)
        parser.add_argument("--format", default="onnx", help="onnx (default) or tensorrt")
        parser.add_argument("--task", default="text-generation", help="text-generation (default)")
        parser.add_argument("--opset", type=int, help="23 of onnx, 24 of tensorrt: there is no other")
        parser.add_argument("--dtype", default="fp32", help="fp32 (default), fp16, or bf16: of onnx on cuda alone")
        parser.add_argument("--device", default="cpu", help="cpu (default) or cuda: where it is compared with torch")
        parser.add_argument(
            "--max-memory",
            metavar="SIZE",
            help="memory to make do with, such as 1.5GB; what is free by default, and never less than two layers\n"
            "take, or about five times the largest weight",
        )
        parser.add_argument(
            "--last-logits",
            action="store_true",
            help="logits of each row's last token only, for a shorter prefill where text is generated; fed 0 as\n"
            "num_logits_to_keep the graph gives all, which scoring text needs",
        )
        group = parser.add_argument_group("engine, of format tensorrt")
        group.add_argument("--builder", help="tensorrt (default), on and for the GPU that is here, or tensorrt-rtx")
        group.add_argument("--compute-capability", help="GPUs to build for without one, as 89,120: of tensorrt-rtx")
        group.add_argument("--max-batch", type=int, help="rows (default 1)")
        group.add_argument("--max-length", type=int, help="tokens of a text (default 2048, or what the model has)")
        group.add_argument("--max-input", type=int, help="new tokens a call (default as many as a text has)")
        group = parser.add_argument_group("quantization, of the graph that was compared with torch")
        tables = (QUANTIZATION_LINES, ENGINE_QUANTIZATION_LINES)
        ways, engines = ("\n".join(f"  {name}: {line}" for name, line in table.items()) for table in tables)
        group.add_argument(
            "--quantize", default="none", help=f"none (default), or one of\n{ways}\nof tensorrt\n{engines}"
        )
        add_exclude_flag(group)
        group.add_argument(
            "--calibration",
            help=f"for int8-static and int4-gptq, of tensorrt int8 and fp8: {SPEC}\n(default {CHOOSING_TEXT})",
        )
        group.add_argument("--samples", type=int, help="calibration windows (default 32)")
        group.add_argument("--length", type=int, help="tokens a window (default 256)")
        group.add_argument("--seed", type=int, help="of what text is drawn (default 0)")

    @staticmethod
    def execute(args: Namespace, console: Console) -> int:
        """Run the command; returns its exit code."""
        from optimum.exporters.streamline import check_export, export_checkpoint
        from optimum.streamline.checkpoints.loading import read_config, source_notes
        from optimum.streamline.errors import StreamlineError
        from optimum.streamline.system.atomic_output import check_output

        from .inputs import excluded_modules, model_source, note_bare_layers

        if args.task not in ("text-generation", "text-generation-with-past"):
            raise StreamlineError(f"task {args.task!r}: must be text-generation")
        opset = OPSETS.get(args.format)
        if args.opset not in (None, opset):
            raise StreamlineError(
                f"opset {args.opset}: must be {opset}, which has attention and normalisation as single nodes"
            )
        check_export(args.format, args.dtype, args.device, args.quantize, _engine(args))
        if args.quantize_exclude and args.quantize == "none":
            raise StreamlineError(
                f"quantize-exclude {args.quantize_exclude!r}: nothing is quantized; give quantize too"
            )
        check_output(args.output, args.overwrite)
        source = model_source(args, args.model)
        options = source.options() | {
            "verbose": args.verbose,
            "max_memory": _bytes("max-memory", args.max_memory),
            "quantize": args.quantize,
            "quantize_exclude": excluded_modules(args),
            "windows": _calibration(args, console),
            "last_logits": args.last_logits,
            "engine": _engine(args),
        }
        artifact = export_checkpoint(
            args.model, args.output, args.format, args.dtype, args.device, args.overwrite, **options
        )
        for line in (*source_notes(source, read_config(source)), *artifact.findings()):
            console.print(line, markup=False)
        console.print(f"exported to {args.output}", markup=False)
        note_bare_layers(console, model_source(args, args.model))
        return 0


def _engine(args: Namespace) -> EngineOptions | None:
    """What engine is asked for; none where the format has none."""
    from optimum.exporters.streamline import EngineOptions
    from optimum.streamline.errors import StreamlineError

    given = {name: getattr(args, name) for name in ENGINE_FLAGS if getattr(args, name) is not None}
    if args.format != "tensorrt":
        for name, value in given.items():
            raise StreamlineError(
                f"{name.replace('_', '-')} {value}: format {args.format!r} has no engine; leave it out"
            )
        return None
    if asked := given.pop("compute_capability", None):
        try:
            given["capabilities"] = tuple(int(each) for each in asked.split(","))
        except ValueError:
            raise StreamlineError(f"compute-capability {asked!r}: must be numbers by commas, as 89,120") from None
    return EngineOptions(**given)


def _calibration(args: Namespace, console: Console) -> Windows | None:
    """The windows that a way to quantize asks for; none where it asks for none."""
    from optimum.exporters.streamline import ENGINE_QUANTIZERS, GRAPH_QUANTIZERS
    from optimum.streamline.checkpoints.loading import load_tokenizer, read_config
    from optimum.streamline.errors import StreamlineError
    from optimum.streamline.text.windows import read_windows

    from .inputs import model_source

    given = {name: getattr(args, name) for name in CALIBRATION_DEFAULTS if getattr(args, name) is not None}
    ways: Any = ENGINE_QUANTIZERS if args.format == "tensorrt" else GRAPH_QUANTIZERS
    if args.quantize not in ways or not ways[args.quantize].calibrated:
        for name, value in given.items():
            raise StreamlineError(f"{name} {value}: quantize {args.quantize!r} is not calibrated; leave it out")
        return None
    source, asked = model_source(args, args.model), CALIBRATION_DEFAULTS | given
    config = read_config(source)
    limit = config.max_position_embeddings
    if engine := _engine(args):  # whose caches have no room for more
        limit = engine.limits(limit).length
        asked["length"] = given.get("length", min(asked["length"], limit))
    for name, least, most in (("samples", 1, 10**6), ("length", 8, limit)):
        if not least <= asked[name] <= most:
            raise StreamlineError(f"{name} {asked[name]}: must be from {least} to {most}")
    how = (asked["samples"], asked["length"], asked["seed"], config.vocab_size, "calibration")
    windows = read_windows(asked["calibration"], load_tokenizer(source), *how)
    console.print(windows.line("calibration"), markup=False)
    return windows


def _bytes(name: str, text: str | None) -> int | None:
    """The number of bytes that a size says, such as `1.5GB`."""
    from optimum.streamline.errors import StreamlineError

    if text is None:
        return None
    number = text.upper().removesuffix("B")
    unit = {"K": 10**3, "M": 10**6, "G": 10**9}.get(number[-1:], 1)
    try:
        size = int(float(number if unit == 1 else number[:-1]) * unit)
    except (ValueError, OverflowError):
        size = 0
    if size <= 0:
        raise StreamlineError(f"{name} {text!r}: must be a size in bytes, or one such as 500MB or 1.5GB")
    return size
