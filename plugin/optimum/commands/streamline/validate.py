"""`optimum-cli streamline validate`: its flags, and what it does with them."""

from __future__ import annotations

import argparse
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from optimum.commands.base import CommandInfo

from .base import Command
from .options import add_evaluation_flags, add_recipe_flag, add_shared_recipe_flags, add_source_flags

if TYPE_CHECKING:
    from rich.console import Console


class ValidateCommand(Command):
    """`optimum-cli streamline validate`."""

    COMMAND = CommandInfo(name="validate", help="Accuracy and latency of candidates against the original.")

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        """Flags of `validate`."""
        Command.parse_args(parser)
        parser.add_argument("original", help="the original checkpoint, which --revision is of")
        parser.add_argument(
            "candidate",
            nargs="+",
            help="checkpoints or exports; an export of the original is recognised. A Hub id as name@revision",
        )
        parser.add_argument("--output", type=Path, default=Path("streamline-report"), help="a folder for the report")
        parser.add_argument("--overwrite", action="store_true", help="replace an earlier output of this program")
        add_source_flags(parser)
        add_evaluation_flags(parser)
        parser.add_argument(
            "--questions",
            type=Path,
            metavar="FILE",
            help="multiple-choice questions, for accuracy and stability: one JSON object a line, such as\n"
            '{"question": "The capital of France is", "options": [" Paris", " London"], "answer": 0}',
        )
        group = parser.add_argument_group("how it is measured")
        add_recipe_flag(group, "--dtype", "what checkpoints are computed in: fp32 (default), fp16 or bf16")
        group.add_argument("--rounds", type=int, default=10, help="timed rounds of every model in turn (default 10)")
        add_shared_recipe_flags(group)

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
