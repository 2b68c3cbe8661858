"""From the keys of YAML, flags or Python to a `Recipe`, and back; every fault becomes one line.

An option has two keys: its name in its group (`healing: {tokens: 100}`), and the name of its flag with underscores
(`heal_tokens: 100`). Files are written with the first.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optimum.streamline.errors import StreamlineError, shown

from .options import DefinedOption, options_of
from .recipe import GROUPS, OPTIONS, Recipe
from .yaml12 import dump_yaml, parse_yaml

_LONGEST_FILE = 2**16  # bytes of a recipe


@dataclass(frozen=True)
class Given:
    """One option as it was given.

    Args:
        value: Not yet checked.
        name: What a message calls the option: its key as it was given, with dashes.
        origin: What a message calls the place it was given in.
    """

    value: Any
    name: str
    origin: str


def make_recipe(fields: dict[str, Any], origin: str = "recipe") -> Recipe:
    """A recipe from plain fields, by either key of each option.

    Args:
        fields: The keys and values; a group is a mapping, or an instance of its class.
        origin: What a message calls the fields' source.

    Raises:
        StreamlineError: the first field that is unknown, given twice, of another type or out of range, and what would
            be right.
    """
    return recipe_of_given(given_options(fields, origin))


def given_options(fields: dict[str, Any], origin: str) -> dict[str, Given]:
    """The options in `fields`, by the names of their flags with underscores.

    Raises:
        StreamlineError: a key is unknown, or an option is given by both of its keys.
    """
    found: dict[str, Given] = {}
    for key, value in fields.items():
        for option, given in _options_under(key, value, origin):
            if option.key in found:
                raise StreamlineError(
                    f"{origin}: {given.name} is {shown(given.value)}: is given as {found[option.key].name} too; leave "
                    "one out"
                )
            found[option.key] = given
    return found


def recipe_of_given(given: dict[str, Given]) -> Recipe:
    """The recipe of these options, by the names of their flags with underscores.

    Raises:
        StreamlineError: the first that is of another type or out of range, and what would be right.
    """
    return Recipe().with_options(**{key: _checked(OPTIONS[key], each) for key, each in given.items()})


def _options_under(key: Any, value: Any, origin: str) -> Iterator[tuple[DefinedOption, Given]]:
    """What a key gives: one option, or those of a group. `calibration` is both: a group, or its text."""
    group = GROUPS.get(key)
    if group is not None and isinstance(value, group):
        value = vars(value)
    if group is not None and isinstance(value, dict):
        names = {each.name: OPTIONS[each.key] for each in options_of(group)}
        for name, each in value.items():
            if name not in names:
                raise StreamlineError(f"{origin}: {key}: unknown key {shown(name)}; known are {', '.join(names)}")
            yield names[name], Given(each, f"{key}.{name.replace('_', '-')}", origin)
    elif key in OPTIONS:
        yield OPTIONS[key], Given(value, key.replace("_", "-"), origin)
    elif group is not None:
        known = ", ".join(each.name for each in options_of(group))
        raise StreamlineError(
            f"{origin}: {key} is {shown(value)}: must be options with their values; known are {known}"
        )
    else:
        known = ", ".join(OPTIONS)
        raise StreamlineError(
            f"{origin}: unknown key {shown(key)}; known are {known}, and the groups {', '.join(GROUPS)}"
        )


def _checked(option: DefinedOption, given: Given) -> Any:
    value, name = given.value, f"{given.origin}: {given.name}"
    if option.option.commas:
        value = _joined(option, value, name)
    if isinstance(value, str) and not _is_text(value):
        raise StreamlineError(f"{name} is {shown(value)}: holds a character that cannot be printed")
    return option.checked(value, name)


def _joined(option: DefinedOption, value: Any, name: str) -> Any:
    """A list with commas, from the string itself, one number, or a list of both."""
    items = value if isinstance(value, list) else [value]
    if all(isinstance(each, (int, str)) and not isinstance(each, bool) for each in items):
        return ",".join(str(each) for each in items)
    if isinstance(value, list):
        raise StreamlineError(f"{name} is {shown(value)}: must be one list, or written as {option.option.commas}")
    return value


def _is_text(value: str) -> bool:
    """Whether it can name a file (bytes of a name that are not UTF-8 are surrogates) and has no control characters."""
    try:
        value.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return False
    return not any(unicodedata.category(character) == "Cc" for character in value)


def read_recipe(path: Path) -> dict[str, Any]:
    """The fields of a recipe file, not yet checked.

    Raises:
        StreamlineError: the file cannot be read, is too long, or is not a YAML mapping.
    """
    try:
        with path.open("rb") as stream:
            content = stream.read(_LONGEST_FILE + 1)  # of what may have no end
    except (OSError, ValueError) as error:  # the latter of a path that cannot be
        raise StreamlineError(f"recipe {path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    if len(content) > _LONGEST_FILE:
        raise StreamlineError(f"recipe {path}: is no recipe, it is longer than {_LONGEST_FILE} bytes")
    try:
        fields = parse_yaml(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise StreamlineError(f"recipe {path}: is not text in UTF-8 (byte {error.start + 1})") from None
    except ValueError as error:
        raise StreamlineError(f"recipe {path}: {error}") from None
    if not isinstance(fields, dict):
        raise StreamlineError(f"recipe {path}: must be keys with values, such as `remove: 25%`")
    return fields


def write_recipe(recipe: Recipe) -> str:
    """The recipe as YAML that `read_recipe` takes back to the same recipe."""
    return dump_yaml(recipe.to_dict())
