"""`optimum-cli streamline prune`: its flags and its work."""

from __future__ import annotations

import argparse
from argparse import Namespace
from typing import TYPE_CHECKING

from optimum.commands.base import CommandInfo

from .base import Command

if TYPE_CHECKING:
    from rich.console import Console


class PruneCommand(Command):
    """`optimum-cli streamline prune`."""

    COMMAND = CommandInfo(name="prune", help="Prune and heal a model, and save it as a checkpoint.")

    @staticmethod
    def add_flags(parser: argparse.ArgumentParser) -> None:
        """Flags of `prune`."""
        from .options import add_model_flags, add_options, add_output_flags, add_plan_flags

        add_model_flags(parser)
        add_output_flags(parser)
        add_plan_flags(parser)
        groups = ("pruning", "healing", "calibration", "quantization")
        add_options(parser, *groups, "length", "dtype", "compute_dtype", "device", "max_memory", "seed")

    @staticmethod
    def execute(args: Namespace, console: Console) -> int:
        """Run the command; returns its exit code."""
        from optimum.streamline.pipeline.preflight import check_recipe
        from optimum.streamline.pipeline.prune import prune

        from .console import notifier
        from .dry_run import dry_run
        from .inputs import check_on, model_source, recipe_of, saved_recipe

        source, recipe = model_source(args, args.model), recipe_of(args)
        check_on(args)
        check_recipe(source, recipe)
        with saved_recipe(args, recipe, console):
            if args.dry_run:
                return dry_run(source, recipe, args, console)
            prune(source, recipe, args.output, overwrite=args.overwrite, verbose=args.verbose, notify=notifier(console))
        return 0
