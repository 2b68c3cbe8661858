"""`optimum-cli streamline orthogonality`: its flags and its work."""

from __future__ import annotations

import argparse
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from optimum.commands.base import CommandInfo

from .base import Command

if TYPE_CHECKING:
    from rich.console import Console


class OrthogonalityCommand(Command):
    """`optimum-cli streamline orthogonality`."""

    COMMAND = CommandInfo(
        name="orthogonality",
        help="Measure whether pruning makes quantization cost more accuracy, in both orders.",
    )

    @staticmethod
    def add_flags(parser: argparse.ArgumentParser) -> None:
        """Flags of `orthogonality`."""
        from optimum.exporters.streamline import GRAPH_QUANTIZERS
        from optimum.streamline.quantization.quantizers import QUANTIZERS

        from .options import add_model_flags, add_options, add_overwrite_flag, descriptions_of, listed

        add_model_flags(parser)
        parser.add_argument(
            "recipe", type=Path, nargs="?", help="Recipe: a YAML file with options. A flag overrides it."
        )
        parser.add_argument(
            "--output",
            type=Path,
            default=Path("streamline-orthogonality"),
            metavar="FOLDER",
            help="Folder for the report. (default: streamline-orthogonality)",
        )
        add_overwrite_flag(parser)
        parser.add_argument(
            "--quantizers",
            default="int8,int4",
            metavar="NAMES",
            help="Quantizers to measure, separated by commas. (default: int8,int4)\nIn ONNX Runtime:\n"
            f"{listed(descriptions_of(GRAPH_QUANTIZERS))}\nIn torch:\n{listed(descriptions_of(QUANTIZERS))}",
        )
        shared = ("length", "dtype", "device", "seed")
        add_options(parser, "pruning", "healing", "calibration", "evaluation", "budget", *shared)

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
            raise StreamlineError(
                f"quantizers {args.quantizers!r}: must be different names of quantizers, separated by commas"
            )
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
