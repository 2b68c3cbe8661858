"""`optimum-cli streamline score`: its flags and its work."""

from __future__ import annotations

import argparse
import json
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimum.commands.base import CommandInfo

from .base import Command

if TYPE_CHECKING:
    from rich.console import Console


class ScoreCommand(Command):
    """`optimum-cli streamline score`."""

    COMMAND = CommandInfo(name="score", help="Measure how much each layer matters; give a table, JSON and a plot.")

    @staticmethod
    def add_flags(parser: argparse.ArgumentParser) -> None:
        """Flags of `score`."""
        from .options import add_model_flags, add_options, add_overwrite_flag

        add_model_flags(parser)
        parser.add_argument("output", type=Path, nargs="?", help="Folder for scores.json and the plot.")
        add_overwrite_flag(parser)
        add_options(parser, "calibration", "length", "compute_dtype", "device", "max_memory", "seed")

    @staticmethod
    def execute(args: Namespace, console: Console) -> int:
        """Run the command; returns its exit code."""
        from optimum.streamline.pipeline.prune import score
        from optimum.streamline.reporting.plots import layer_importance_svg
        from optimum.streamline.reporting.record import scores_to_dict
        from optimum.streamline.system.atomic_output import check_output, write_file

        from .console import notifier
        from .inputs import model_source, note_bare_layers, recipe_of

        recipe = recipe_of(args)
        if args.output is not None:
            check_output(args.output, args.overwrite)
        scores, windows = score(model_source(args, args.model), recipe, notifier(console))
        note_bare_layers(console, model_source(args, args.model))
        console.print(_score_table(scores.block_influence))
        if args.output is not None:
            text = {"model": args.model, "calibration": windows.describe(), **scores_to_dict(scores)}
            write_file(args.output / "scores.json", json.dumps(text, indent=1) + "\n")
            write_file(args.output / "scores.svg", layer_importance_svg(scores.block_influence, {}))
            console.print(f"scores and plot: {args.output}", markup=False)
        return 0


def _score_table(influence: tuple[float, ...]) -> Any:
    from rich.table import Table

    table = Table(title="Block Influence: 1 - mean cosine of a layer's input and output")
    for column in ("layer", "influence", "rank"):
        table.add_column(column, justify="right")
    ranks = sorted(range(len(influence)), key=lambda layer: influence[layer])
    for layer, value in enumerate(influence):
        table.add_row(str(layer), f"{value:.5f}", str(ranks.index(layer) + 1))
    return table
