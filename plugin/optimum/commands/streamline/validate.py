"""`optimum-cli streamline validate`: its flags and its work."""

from __future__ import annotations

import argparse
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from optimum.commands.base import CommandInfo

from .base import Command

if TYPE_CHECKING:
    from rich.console import Console


class ValidateCommand(Command):
    """`optimum-cli streamline validate`."""

    COMMAND = CommandInfo(name="validate", help="Compare accuracy and latency of candidates with the original.")

    @staticmethod
    def add_flags(parser: argparse.ArgumentParser) -> None:
        """Flags of `validate`."""
        from optimum.streamline.evaluation.latency import ROUNDS

        from .options import add_options, add_overwrite_flag, add_source_flags

        parser.add_argument("original", help="Checkpoint of the original: a folder, or a Hub id (see --revision).")
        parser.add_argument(
            "candidate",
            nargs="+",
            help="Checkpoints or exports to compare with the original: folders, or Hub ids, also as name@revision. "
            "An export of the original itself counts as the original, not as a candidate.",
        )
        parser.add_argument(
            "--output",
            type=Path,
            default=Path("streamline-report"),
            metavar="FOLDER",
            help="Folder for the report. (default: streamline-report)",
        )
        add_overwrite_flag(parser)
        add_source_flags(parser)
        parser.add_argument(
            "--rounds",
            type=int,
            default=ROUNDS,
            metavar="N",
            help=f"Number of times that each model is timed, in turn with the others. (default: {ROUNDS})",
        )
        parser.add_argument(
            "--questions",
            type=Path,
            metavar="FILE",
            help="Multiple-choice questions, for accuracy and stability: one JSON object a line, such as\n"
            '{"question": "The capital of France is", "options": [" Paris", " London"], "answer": 0}',
        )
        parser.add_argument(
            "--max-memory",
            metavar="SIZE",
            help="Memory of the CPU to make do with, in bytes or such as 8GB. Models that do not fit into it together "
            "are measured one at a time. (default: the memory that is free)",
        )
        add_options(parser, "evaluation", "budget", "length", "dtype", "device", "seed")

    @staticmethod
    def execute(args: Namespace, console: Console) -> int:
        """Run the command; returns its exit code."""
        from optimum.streamline.evaluation.validate import compared_models_of
        from optimum.streamline.pipeline.validation import validate_models
        from optimum.streamline.reporting.files import write_report
        from optimum.streamline.reporting.text_forms import comparison_table
        from optimum.streamline.system.atomic_output import check_output

        from .console import notifier
        from .inputs import model_source, note_bare_layers, recipe_of

        recipe = recipe_of(args)
        check_output(args.output, args.overwrite)
        compared_models = compared_models_of(model_source(args, args.original), args.candidate)
        report = validate_models(
            compared_models, recipe, questions=args.questions, rounds=args.rounds, notify=notifier(console)
        )
        write_report(report, args.output)
        console.print(comparison_table(report))
        console.print(f"report: {args.output / 'report.html'}", markup=False)
        note_bare_layers(console, *(compared.source for compared in compared_models))
        return report.exit_code
