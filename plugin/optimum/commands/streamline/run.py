"""`optimum-cli streamline run`: its flags and its work."""

from __future__ import annotations

import argparse
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from optimum.commands.base import CommandInfo

from .base import Command

if TYPE_CHECKING:
    from rich.console import Console


class RunCommand(Command):
    """`optimum-cli streamline run`."""

    COMMAND = CommandInfo(
        name="run", help="Prune, heal, export and validate, as a recipe says; skip steps already finished."
    )

    @staticmethod
    def add_flags(parser: argparse.ArgumentParser) -> None:
        """Flags of `run`."""
        from optimum.streamline.recipe.recipe import OPTIONS

        from .options import add_model_flags, add_options, add_output_flags, add_plan_flags

        add_model_flags(parser)
        parser.add_argument(
            "recipe", type=Path, nargs="?", help="Recipe: a YAML file with options. A flag overrides it."
        )
        add_output_flags(parser)
        add_plan_flags(parser)
        add_options(parser, *OPTIONS)

    @staticmethod
    def execute(args: Namespace, console: Console) -> int:
        """Run the command; returns its exit code."""
        from optimum.streamline.pipeline.preflight import check_recipe
        from optimum.streamline.pipeline.run import run
        from optimum.streamline.reporting.text_forms import comparison_table
        from optimum.streamline.system.atomic_output import refuse_own_input

        from .console import notifier
        from .dry_run import dry_run
        from .inputs import check_on, model_source, recipe_of, saved_recipe

        source, recipe = model_source(args, args.model), recipe_of(args)
        check_on(args)
        check_recipe(source, recipe)
        refuse_own_input(args.output, (str(args.recipe),) if args.recipe else ())
        with saved_recipe(args, recipe, console):
            if args.dry_run:
                return dry_run(source, recipe, args, console, validates=True)
            report = run(
                source, recipe, args.output, overwrite=args.overwrite, verbose=args.verbose, notify=notifier(console)
            )
        console.print(comparison_table(report))
        console.print(f"checkpoint: {args.output}", markup=False)
        console.print(f"report: {args.output / 'report.html'}", markup=False)
        return report.exit_code
