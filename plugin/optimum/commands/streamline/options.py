"""The flags: those of the recipe, made from its definition, and the few others that several commands share."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from optimum.exporters.streamline import GRAPH_QUANTIZERS
from optimum.streamline.methods.names import METHOD_SUMMARIES
from optimum.streamline.methods.third_party import third_party_methods
from optimum.streamline.quantization.quantizers import NONE, QUANTIZERS
from optimum.streamline.recipe.options import DefinedOption, summary_of
from optimum.streamline.recipe.recipe import GROUPS, OPTIONS

SPEC = (
    "SPEC names a text: a text file, a table (FILE[,COLUMN]), a folder of these, "
    "hub:DATASET[@REVISION][,CONFIG[,SPLIT[,COLUMN]]] of the Hugging Face Hub, or stdlib (the source code of Python's "
    "standard library)."
)


def listed(texts: Mapping[str, str]) -> str:
    """A list of choices for a help text, one a line: the name, and what it does."""
    return "\n".join(f"  {name}: {text}" for name, text in texts.items())


class Described(Protocol):
    """An entry of a table that describes itself in one line."""

    @property
    def description(self) -> str:
        """One line for the user."""


def descriptions_of(quantizers: Mapping[str, Described]) -> dict[str, str]:
    """The description of each quantizer of a table, by its name."""
    return {name: each.description for name, each in quantizers.items()}


def add_options(parser: argparse.ArgumentParser, *names: str) -> None:
    """Add the flags of these groups and options of the recipe.

    Args:
        names: Groups, such as `healing`, and names of flags with underscores, such as `length`.
    """
    options = [each for each in OPTIONS.values() if each.group in names or each.key in names]
    titles = dict.fromkeys(each.group for each in options)
    for title in titles:
        description = summary_of(GROUPS[title]) if title else "Options that all steps share."
        group = parser.add_argument_group(title or "all steps", description)
        for each in options:
            if each.group == title:
                add_option(group, each.key)
    parser.epilog = SPEC if any(each.option.metavar == "SPEC" for each in options) else None


def add_option(
    group: Any,
    key: str,
    *,
    choices: str = "",
    default: Any = argparse.SUPPRESS,
    told_default: Any = None,
    required: bool = False,
) -> None:
    """Add the flag of one option of the recipe, with the type and the help of its definition.

    Args:
        group: The parser, or a group of its flags.
        key: The flag's name with underscores.
        choices: Lines on the choices; left out, those of a recipe.
        default: Value of a flag that is not given. Without it `args` has no such attribute, so that the value of a
            recipe file, or the recipe's default, stands.
        told_default: The default for the help, if it is not the recipe's.
        required: Whether the flag must be given.
    """
    option = OPTIONS[key]
    lines = choices or (_CHOICES[key]() if key in _CHOICES else "")
    text = option.option.help if required else option.help(told_default)
    text = "\n".join(line for line in (text, lines) if line).replace("%", "%%")
    if option.types == (bool,):
        group.add_argument(option.flag, default=default, action="store_true", help=text)
        return
    kind = option.types[0] if option.types in ((int,), (float,)) else str
    group.add_argument(option.flag, default=default, required=required, type=kind, help=text, metavar=_metavar(option))


def _metavar(option: DefinedOption) -> str:
    numbers = {(int,): "N", (float,): "X"}
    return option.option.metavar or numbers.get(option.types) or option.name.upper().replace("_", "-")


def _method_lines() -> str:
    others = {each.name: f"from {each.package}" for each in third_party_methods()}  # imports none of them
    return listed(METHOD_SUMMARIES | others)


def _quantizer_lines() -> str:
    checkpoints, graphs = (listed(descriptions_of(table)) for table in (QUANTIZERS, GRAPH_QUANTIZERS))
    return f"{NONE}, or for the checkpoint one of\n{checkpoints}\nor for the ONNX export one of\n{graphs}"


# The choices of options that take any name: the tables of these names are above the recipe.
_CHOICES: dict[str, Callable[[], str]] = {"method": _method_lines, "quantize": _quantizer_lines}


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Add `-m/--model`, and how it may be read."""
    parser.add_argument(
        "-m", "--model", required=True, help="Folder of a checkpoint, or an id on the Hub, also as name@revision."
    )
    add_source_flags(parser)


def add_source_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags on how models may be read."""
    parser.add_argument("--revision", help="Branch, tag or commit of the model on the Hub. (default: its main branch)")
    parser.add_argument("--cache_dir", metavar="FOLDER", help="Folder that keeps downloads from the Hub.")
    parser.add_argument("--trust-remote-code", action="store_true", help="Run code that comes with the checkpoint.")
    parser.add_argument("--verbose", action="store_true", help="Also print the messages of other libraries.")


def add_output_flags(parser: argparse.ArgumentParser) -> None:
    """Add the output folder and `--overwrite`."""
    parser.add_argument("output", type=Path, help="Folder to write.")
    add_overwrite_flag(parser)


def add_overwrite_flag(parser: argparse.ArgumentParser) -> None:
    """Add `--overwrite`."""
    parser.add_argument("--overwrite", action="store_true", help="Replace an earlier output of this program.")


def add_plan_flags(parser: argparse.ArgumentParser) -> None:
    """Add `--dry-run` and `--save-recipe`."""
    parser.add_argument(
        "--dry-run", action="store_true", help="Print which layers would go and the ideal speed-up; write nothing."
    )
    parser.add_argument(
        "--save-recipe", type=Path, metavar="FILE", help="Write the recipe of these flags to a YAML file, at the end."
    )
