"""`optimum-cli streamline orthogonality`: its flags, and what it does with them."""

from __future__ import annotations

import argparse
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from optimum.commands.base import CommandInfo

from .base import Command
from .options import (
    CHECKPOINT_QUANTIZATION_LINES,
    QUANTIZATION_LINES,
    add_evaluation_flags,
    add_model_flags,
    add_pruning_flags,
)

if TYPE_CHECKING:
    from rich.console import Console


class OrthogonalityCommand(Command):
    """`optimum-cli streamline orthogonality`."""

    COMMAND = CommandInfo(
        name="orthogonality",
        help="Does pruning leave quantizing what it was? Measured, in both orders.",
    )

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        """Flags of `orthogonality`."""
        Command.parse_args(parser)
        add_model_flags(parser)
        parser.add_argument("recipe", type=Path, nargs="?", help="a YAML recipe of the pruning; flags go over it")
        parser.add_argument(
            "--output", type=Path, default=Path("streamline-orthogonality"), help="a folder for the report"
        )
        parser.add_argument("--overwrite", action="store_true", help="replace an earlier output of this program")
        names = ", ".join((*QUANTIZATION_LINES, *CHECKPOINT_QUANTIZATION_LINES))
        parser.add_argument(
            "--quantizers",
            default="int8,int4",
            help=f"by commas (default int8,int4), of\n{names};\nthe first five in ONNX Runtime, the others in torch",
        )
        add_pruning_flags(parser, quantizes=False)
        add_evaluation_flags(parser)

    @staticmethod
    def execute(args: Namespace, console: Console) -> int:
        """Run the command; returns its exit code."""
        from optimum.streamline.errors import StreamlineError
        from optimum.streamline.pipeline.orthogonality import orthogonality
        from optimum.streamline.reporting.text_forms import interactions_table

        from .console import notifier
        from .inputs import model_source, recipe_of

        quantizers = [each.strip() for each in args.quantizers.split(",") if each.strip()]
        if not quantizers or len(set(quantizers)) < len(quantizers):
            raise StreamlineError(f"quantizers {args.quantizers!r}: must be names of quantizers, each once, by commas")
        report = orthogonality(
            model_source(args, args.model),
            recipe_of(args),
            quantizers,
            args.output,
            overwrite=args.overwrite,
            verbose=args.verbose,
            notify=notifier(console),
        )
        console.print(interactions_table(report))
        console.print(f"report: {args.output / 'report.html'}", markup=False)
        return report.exit_code
