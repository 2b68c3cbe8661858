"""`optimum-cli streamline quantize`: its flags and its work."""

from __future__ import annotations

import argparse
from argparse import Namespace
from typing import TYPE_CHECKING

from optimum.commands.base import CommandInfo

from .base import Command

if TYPE_CHECKING:
    from rich.console import Console


class QuantizeCommand(Command):
    """`optimum-cli streamline quantize`."""

    COMMAND = CommandInfo(name="quantize", help="Quantize a checkpoint with bitsandbytes or torchao.")

    @staticmethod
    def add_flags(parser: argparse.ArgumentParser) -> None:
        """Flags of `quantize`."""
        from optimum.streamline.quantization.quantizers import QUANTIZERS

        from .options import add_model_flags, add_option, add_output_flags, descriptions_of, listed

        add_model_flags(parser)
        add_output_flags(parser)
        add_option(parser, "quantize", choices=listed(descriptions_of(QUANTIZERS)), required=True)
        add_option(parser, "quantize_exclude", default="")
        add_option(parser, "device", default="cpu")

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
