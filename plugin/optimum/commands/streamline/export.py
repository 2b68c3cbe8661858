"""`optimum-cli streamline export`: its flags and its work."""

from __future__ import annotations

import argparse
from argparse import Namespace
from typing import TYPE_CHECKING, Any

from optimum.commands.base import CommandInfo

from .base import Command

if TYPE_CHECKING:
    from rich.console import Console

    from optimum.exporters.streamline import EngineOptions
    from optimum.streamline.text.windows import Windows

OPSETS = {"onnx": 23, "tensorrt": 24}
ENGINE_FLAGS = ("builder", "compute_capability", "max_batch", "max_length", "max_input")


class ExportCommand(Command):
    """`optimum-cli streamline export`."""

    COMMAND = CommandInfo(name="export", help="Export a checkpoint to ONNX or TensorRT, and compare it with torch.")

    @staticmethod
    def add_flags(parser: argparse.ArgumentParser) -> None:
        """Flags of `export`."""
        from optimum.exporters.streamline import ENGINE_QUANTIZERS, GRAPH_QUANTIZERS

        from .options import SPEC, add_model_flags, add_option, add_output_flags, descriptions_of, listed

        add_model_flags(parser)
        add_output_flags(parser)
        parser.add_argument("--format", default="onnx", help="Format of the export: onnx or tensorrt. (default: onnx)")
        parser.add_argument(
            "--task", default="text-generation", help="Only text-generation. (default: text-generation)"
        )
        parser.add_argument(
            "--opset", type=int, metavar="N", help="ONNX opset. Only 23 for onnx and 24 for tensorrt, the defaults."
        )
        add_option(
            parser, "dtype", choices="bf16 needs format onnx and device cuda.", default="fp32", shown_default="fp32"
        )
        add_option(parser, "device", default="cpu")
        # Not the recipe's option: an export traces in parts, so its limit has a floor, and another help.
        parser.add_argument(
            "--max-memory",
            metavar="SIZE",
            help="Limit of the memory to use, such as 1.5GB. Two layers, and about five times the largest weight, must "
            "fit. (default: all free memory)",
        )
        parser.add_argument(
            "--last-logits",
            action="store_true",
            help="Return only the logits of the last token of each row, for a faster prefill. For all logits, as for "
            "perplexity, set the graph's input num_logits_to_keep to 0.",
        )
        group = parser.add_argument_group("engine", "Engine of format tensorrt.")
        group.add_argument(
            "--builder",
            help="tensorrt, which builds for the GPU of this machine, or tensorrt-rtx. (default: tensorrt)",
        )
        group.add_argument(
            "--compute-capability",
            metavar="NUMBERS",
            help="Compute capabilities of the GPUs that tensorrt-rtx builds for, such as 89,120. (default: of this "
            "machine's GPU)",
        )
        group.add_argument(
            "--max-batch", type=int, metavar="N", help="Largest number of texts in a batch. (default: 1)"
        )
        group.add_argument(
            "--max-length",
            type=int,
            metavar="N",
            help="Largest number of tokens in a text. (default: 2048, or fewer if the model reads fewer)",
        )
        group.add_argument(
            "--max-input",
            type=int,
            metavar="N",
            help="Largest number of new tokens in one call. (default: --max-length)",
        )
        group = parser.add_argument_group(
            "quantization", "Quantization of the exported graph, after the comparison with torch."
        )
        choices = f"For onnx one of\n{listed(descriptions_of(GRAPH_QUANTIZERS))}\nfor tensorrt one of\n"
        add_option(group, "quantize", choices=choices + listed(descriptions_of(ENGINE_QUANTIZERS)), default="none")
        add_option(group, "quantize_exclude", default="")
        group = parser.add_argument_group(
            "calibration", "For the quantizers int8-static and int4-gptq of onnx, and int8 and fp8 of tensorrt."
        )
        for key, value in _calibration_defaults().items():
            add_option(group, key, default=None, shown_default=value)
        parser.epilog = SPEC

    @staticmethod
    def execute(args: Namespace, console: Console) -> int:
        """Run the command; returns its exit code."""
        from optimum.exporters.streamline import check_export, export_checkpoint
        from optimum.streamline.checkpoints.loading import read_config, source_notes
        from optimum.streamline.errors import StreamlineError
        from optimum.streamline.recipe.quantities import memory_limit
        from optimum.streamline.system.atomic_output import check_output

        from .inputs import excluded_modules, model_source, note_bare_layers

        if args.task not in ("text-generation", "text-generation-with-past"):
            raise StreamlineError(f"task {args.task!r}: must be text-generation")
        opset = OPSETS.get(args.format)
        if opset is not None and args.opset not in (None, opset):
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
            "max_memory": memory_limit(args.max_memory),
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
    """The engine options that the flags give; `None` for a format without an engine."""
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
            raise StreamlineError(
                f"compute-capability {asked!r}: must be numbers separated by commas, such as 89,120"
            ) from None
    return EngineOptions(**given)


def _calibration_defaults() -> dict[str, Any]:
    """The defaults of the calibration flags: the recipe's, but with fewer and shorter windows."""
    from optimum.streamline.recipe.recipe import OPTIONS

    names = ("calibration", "samples", "length", "seed")
    return {name: OPTIONS[name].default for name in names} | {"samples": 32, "length": 256}


def _calibration(args: Namespace, console: Console) -> Windows | None:
    """The calibration windows; `None` for a quantizer that needs none.

    Raises:
        StreamlineError: a calibration flag is out of range or has no effect, or the text cannot be used.
    """
    from optimum.streamline.checkpoints.loading import load_tokenizer, read_config
    from optimum.streamline.errors import StreamlineError
    from optimum.streamline.pipeline.exporting import is_calibrated
    from optimum.streamline.text.windows import read_windows

    from .inputs import model_source

    given = {name: getattr(args, name) for name in _calibration_defaults() if getattr(args, name) is not None}
    if not is_calibrated(args.format, args.quantize):
        for name, value in given.items():
            raise StreamlineError(f"{name} {value}: quantize {args.quantize!r} needs no calibration text; leave it out")
        return None
    source, asked = model_source(args, args.model), _calibration_defaults() | given
    config = read_config(source)
    limit = config.max_position_embeddings
    if engine := _engine(args):  # its caches hold no more tokens
        limit = engine.limits(limit).length
        asked["length"] = given.get("length", min(asked["length"], limit))
    for name, least, most in (("samples", 1, 10**6), ("length", 8, limit)):
        if not least <= asked[name] <= most:
            raise StreamlineError(f"{name} {asked[name]}: must be from {least} to {most}")
    drawn = (asked["samples"], asked["length"], asked["seed"], config.vocab_size, "calibration")
    windows = read_windows(asked["calibration"], load_tokenizer(source), *drawn)
    console.print(windows.line("calibration"), markup=False)
    return windows
