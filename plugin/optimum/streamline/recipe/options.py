"""How an option is defined: once, with its type, default, range and help.

The groups of `recipe.py` are dataclasses whose fields are `Annotated[type, Option("help"), range]`. From these fields
come the flags and their help, the keys of YAML and of Python, the checks, and the docstrings of the groups.

This file imports neither pydantic nor torch, because a command reads it to print its help. Two libraries also make
flags from types, but do not fit: pydantic-settings imports pydantic for every help text and is one more dependency, and
typer makes a click command, which cannot be a subcommand of optimum-cli's argparse.
"""

from __future__ import annotations

import dataclasses
import textwrap
import types
from functools import cache
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from optimum.streamline.errors import StreamlineError, shown

HUGE = 10**9
"""The largest value of counts that have no limit of their own."""


@dataclasses.dataclass(frozen=True)
class Option:
    """What defines an option beside its type, range and default.

    Args:
        help: What it does, in one or two sentences.
        key: The flag's name with underscores, also a key of YAML and of Python; if empty, the field's own name.
        default: What the default `None` stands for, in words for the help.
        metavar: The name of the value in the help; if empty, it follows from the type.
        pattern: A regular expression that a string must match as a whole.
        form: What a value must look like, for the error message.
        commas: An example, for a string that holds a list with commas. YAML and Python may then give a list too.
    """

    help: str
    key: str = ""
    default: str = ""
    metavar: str = ""
    pattern: str = ""
    form: str = ""
    commas: str = ""


@dataclasses.dataclass(frozen=True)
class DefinedOption:
    """One option of a recipe: its field, and its place in the recipe.

    Args:
        name: The field's name in its group.
        key: The flag's name with underscores.
        group: The field of the recipe that holds the option; empty for an option of the recipe itself.
        annotation: The type with its range.
        default: The default.
        option: The help and the other parts of the definition.
    """

    name: str
    key: str
    group: str
    annotation: Any
    default: Any
    option: Option

    @property
    def flag(self) -> str:
        """The flag, such as `--heal-tokens`."""
        return f"--{self.key.replace('_', '-')}"

    @property
    def types(self) -> tuple[Any, ...]:
        """The types of a value: the annotation without its range and without `None`."""
        plain = get_args(self.annotation)[0]
        members = get_args(plain) if get_origin(plain) in (Union, types.UnionType) else (plain,)
        return tuple(each for each in members if each is not type(None))

    @property
    def choices(self) -> tuple[str, ...]:
        """The values, if the type lists them."""
        return tuple(each for kind in self.types if get_origin(kind) is Literal for each in get_args(kind))

    def checked(self, value: Any, name: str) -> Any:
        """The value, with an integer made a float where the option is a float.

        Args:
            value: Any value.
            name: What the message calls the option.

        Raises:
            StreamlineError: the value is of another type or form, or out of range.
        """
        from .value_checks import validated  # imports pydantic, which a help text does not need

        return validated(value, name, self.annotation, self.option.pattern, self.option.form)

    def help(self, default: Any = None) -> str:
        """What the option does, its choices and its default, for the help of a command and for a docstring.

        Args:
            default: The default to show, for a command whose default differs from the recipe's.
        """
        parts = [self.option.help]
        if self.choices:
            parts.append(f"One of {', '.join(self.choices)}.")
        shown_default = default if default is not None else self.option.default or self.default
        if shown_default is not None and shown_default is not False:
            parts.append(f"(default: {shown_default})")
        return " ".join(parts)


def options_of(kind: type) -> tuple[DefinedOption, ...]:
    """The options of a recipe, or of one group, in the order of the definition."""
    return _options_of(kind)  # split in two, because mypy does not accept every class as argument of a cached function


@cache
def _options_of(kind: type) -> tuple[DefinedOption, ...]:
    hints = _hints_of(kind)
    found: list[DefinedOption] = []
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        if get_origin(hint) is Annotated:
            [option] = [each for each in get_args(hint) if isinstance(each, Option)]
            found.append(DefinedOption(field.name, option.key or field.name, "", hint, field.default, option))
        else:
            found += [dataclasses.replace(each, group=field.name) for each in options_of(hint)]
    return tuple(found)


def groups_of(kind: type) -> dict[str, type[CheckedOptions]]:
    """The groups of a recipe: the class of each, by the name of its field."""
    return {
        name: hint
        for name, hint in _hints_of(kind).items()
        if isinstance(hint, type) and issubclass(hint, CheckedOptions)
    }


@cache  # takes a millisecond, and every instance asks
def _hints_of(kind: type) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


class CheckedOptions:
    """Base class of the groups: making an instance refuses a value of the wrong type or out of range."""

    def __post_init__(self) -> None:
        kind = type(self)
        for each in options_of(kind):
            if not each.group:
                value = each.checked(getattr(self, each.name), f"{kind.__name__}: {each.name}")
                object.__setattr__(self, each.name, value)  # the class is frozen; an integer may become a float
        for name, group in groups_of(kind).items():
            if not isinstance(getattr(self, name), group):
                value = shown(getattr(self, name))
                raise StreamlineError(f"{kind.__name__}: {name} is {value}: must be of class {group.__name__}")


_Kind = TypeVar("_Kind", bound=type)


def documented(kind: _Kind) -> _Kind:
    """Class decorator: add an `Args` section with the help of each option to the docstring."""
    lines = [f"{name}: {summary_of(group)}" for name, group in groups_of(kind).items()]
    lines += [f"{each.name}: {each.help()}" for each in options_of(kind) if not each.group]
    wrap = textwrap.TextWrapper(110, subsequent_indent="    ", break_on_hyphens=False)
    wrapped = (wrap.fill(line) for line in lines)
    kind.__doc__ = f"{(kind.__doc__ or '').rstrip()}\n\n    Args:\n{textwrap.indent(chr(10).join(wrapped), ' ' * 8)}\n"
    return kind


def summary_of(kind: type) -> str:
    """The first paragraph of a class's docstring, on one line."""
    return " ".join((kind.__doc__ or "").split("\n\n")[0].split())
