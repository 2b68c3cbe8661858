"""The flags of the recipe's options, made from their definitions, and other flags that several commands share."""

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
    """A list for a help text, with one line for each entry: its name and its description."""
    return "\n".join(f"  {name}: {text}" for name, text in texts.items())


class Described(Protocol):
    """A quantizer with a description."""

    @property
    def description(self) -> str:
        """The description, in one line."""


def descriptions_of(quantizers: Mapping[str, Described]) -> dict[str, str]:
    """The description of each quantizer, by its name."""
    return {name: each.description for name, each in quantizers.items()}


def add_options(parser: argparse.ArgumentParser, *names: str) -> None:
    """Add the flags of these groups and options of the recipe.

    Args:
        names: Groups, such as `healing`, and names of flags with underscores, such as `length`.
    """
    options = [each for each in OPTIONS.values() if each.group in names or each.key in names]
    titles = dict.fromkeys(each.group for each in options)
    for title in titles:
        description = summary_of(GROUPS[title]) if title else "Options of all steps."
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
    shown_default: Any = None,
    required: bool = False,
) -> None:
    """Add the flag of one option of the recipe, with the type and the help of its definition.

    Args:
        group: The parser, or a group of its flags.
        key: The flag's name with underscores.
        choices: Help lines on the choices, if they differ from a recipe's.
        default: The value if the flag is not given. By default `args` then has no such attribute, and the recipe file
            or the recipe's default decides.
        shown_default: The default to show in the help, if it differs from the recipe's.
        required: Whether the flag must be given.
    """
    option = OPTIONS[key]
    lines = choices or (_CHOICES[key]() if key in _CHOICES else "")
    text = option.option.help if required else option.help(shown_default)
    text = "\n".join(line for line in (text, lines) if line).replace("%", "%%")
    if option.types == (bool,):
        action = argparse.BooleanOptionalAction if option.default else "store_true"
        group.add_argument(option.flag, default=default, action=action, help=text)
        return
    kind = option.types[0] if option.types in ((int,), (float,)) else str
    group.add_argument(option.flag, default=default, required=required, type=kind, help=text, metavar=_metavar(option))


def _metavar(option: DefinedOption) -> str:
    numbers = {(int,): "N", (float,): "X"}
    return option.option.metavar or numbers.get(option.types) or option.name.upper().replace("_", "-")


def _method_lines() -> str:
    others = {each.name: f"from {each.package}" for each in third_party_methods()}  # without importing them
    return listed(METHOD_SUMMARIES | others)


def _quantizer_lines() -> str:
    checkpoints, graphs = (listed(descriptions_of(table)) for table in (QUANTIZERS, GRAPH_QUANTIZERS))
    return f"{NONE}, or for the checkpoint one of\n{checkpoints}\nor for the ONNX export one of\n{graphs}"


# Help lines for options whose values are names in a table. The recipe may not import the rooms of these tables.
_CHOICES: dict[str, Callable[[], str]] = {"method": _method_lines, "quantize": _quantizer_lines}


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Add `-m/--model` and the flags of `add_source_flags`."""
    parser.add_argument(
        "-m", "--model", required=True, help="Checkpoint: a folder, or a Hub id, also as name@revision."
    )
    add_source_flags(parser)


def add_source_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that control how models are loaded, and `--verbose`."""
    parser.add_argument("--revision", help="Branch, tag or commit of the model on the Hub. (default: its main branch)")
    parser.add_argument("--cache_dir", metavar="FOLDER", help="Folder for downloads from the Hub.")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="Allow running Python code from the checkpoint."
    )
    parser.add_argument("--verbose", action="store_true", help="Also print the messages of other libraries.")


def add_output_flags(parser: argparse.ArgumentParser) -> None:
    """Add the output folder and `--overwrite`."""
    parser.add_argument("output", type=Path, help="Folder to write.")
    add_overwrite_flag(parser)


def add_overwrite_flag(parser: argparse.ArgumentParser) -> None:
    """Add `--overwrite`."""
    parser.add_argument("--overwrite", action="store_true", help="Replace an earlier output of this program.")


def add_plan_flags(parser: argparse.ArgumentParser) -> None:
    """Add `--dry-run`, `--on` and `--save-recipe`."""
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="Print what each step takes, the plan and the ideal speed-up; write nothing.",
    )
    parser.add_argument(
        "--on",
        metavar="MACHINE",
        help="With --dry-run: print only the memory and the disk that each step takes on another machine, such as "
        "'1x H100-80GB'; nothing is scored.",
    )
    parser.add_argument(
        "--save-recipe", type=Path, metavar="FILE", help="When done, write the recipe of this command to a YAML file."
    )
