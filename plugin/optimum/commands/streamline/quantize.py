"""`optimum-cli streamline quantize`: its flags, and what it does with them."""

from __future__ import annotations

import argparse
from argparse import Namespace
from typing import TYPE_CHECKING

from optimum.commands.base import CommandInfo

from .base import Command
from .options import CHECKPOINT_QUANTIZATION_LINES, add_exclude_flag, add_model_flags, add_output_flags

if TYPE_CHECKING:
    from rich.console import Console


class QuantizeCommand(Command):
    """`optimum-cli streamline quantize`."""

    COMMAND = CommandInfo(name="quantize", help="Quantize a checkpoint for torch; an ONNX export has its own.")

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        """Flags of `quantize`."""
        Command.parse_args(parser)
        add_model_flags(parser)
        add_output_flags(parser)
        lines = "\n".join(f"  {name}: {line}" for name, line in CHECKPOINT_QUANTIZATION_LINES.items())
        parser.add_argument("--quantize", required=True, help=f"one of\n{lines}")
        add_exclude_flag(parser)
        parser.add_argument("--device", default="cpu", help="cpu (default) or cuda: where it is quantized")

    @staticmethod
    def execute(args: Namespace, console: Console) -> int:
        """Run the command; returns its exit code."""
        from optimum.streamline.pipeline.quantize import quantize
        from optimum.streamline.quantization.quantizers import check_quantizer

        from .console import notifier
        from .inputs import excluded_modules, model_source

        check_quantizer(args.quantize)
        quantize(
            model_source(args, args.model),
            args.output,
            args.quantize,
            excluded_modules(args),
            device=args.device,
            overwrite=args.overwrite,
            verbose=args.verbose,
            notify=notifier(console),
        )
        return 0
