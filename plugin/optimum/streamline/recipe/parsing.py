"""Make a `Recipe` from the keys of YAML, flags or Python, and write one as YAML. Every error message is one line.

An option has two keys: its name in its group (`healing: {tokens: 100}`), and the name of its flag with underscores
(`heal_tokens: 100`). Both can be read. Files are written with the first.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from optimum.streamline.errors import StreamlineError, shown

from .options import DefinedOption, options_of
from .recipe import GROUPS, OPTIONS, Recipe
from .yaml12 import dump_yaml, parse_yaml

_LONGEST_FILE = 2**16  # bytes of a recipe


@dataclass(frozen=True)
class Given:
    """The value that the user gave for one option.

    Args:
        value: The value, not yet checked.
        name: The option's name for messages: the key that the user wrote, with dashes.
        origin: Where the user gave it, for messages, such as `flags`.
    """

    value: Any
    name: str
    origin: str


def make_recipe(fields: dict[str, Any], origin: str = "recipe") -> Recipe:
    """Make a recipe from keys and values.

    Args:
        fields: The keys and values. A key may be either key of an option. A group is a mapping or an instance of its
            class.
        origin: Where the fields come from, for messages.

    Raises:
        StreamlineError: a field is unknown, given twice, of the wrong type or out of range. The message names the first
            such field and what would be right.
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
    """Make a recipe from the options given, by the names of their flags with underscores.

    Raises:
        StreamlineError: an option is of the wrong type or out of range. The message names the first such option.
    """
    return Recipe().with_options(**{key: _checked(OPTIONS[key], each) for key, each in given.items()})


def _hint(key: Any, keys: Iterable[str], known: str) -> str:
    """What to write instead of an unknown key: a key that is spelt nearly like it, or else what is known."""
    near = get_close_matches(str(key), keys, 1)
    return f"did you mean {near[0]}?" if near else f"known are {known}"


def _options_under(key: Any, value: Any, origin: str) -> Iterator[tuple[DefinedOption, Given]]:
    """The options that one key sets: one, or several of a group. `calibration` names a group, and the text in it."""
    group = GROUPS.get(key)
    if group is not None and isinstance(value, group):
        value = vars(value)
    if group is not None and isinstance(value, dict):
        names = {each.name: OPTIONS[each.key] for each in options_of(group)}
        for name, each in value.items():
            if name not in names:
                raise StreamlineError(
                    f"{origin}: {key}: unknown key {shown(name)}; {_hint(name, names, ', '.join(names))}"
                )
            yield names[name], Given(each, f"{key}.{name.replace('_', '-')}", origin)
    elif key in OPTIONS:
        yield OPTIONS[key], Given(value, key.replace("_", "-"), origin)
    elif group is not None:
        known = ", ".join(each.name for each in options_of(group))
        raise StreamlineError(
            f"{origin}: {key} is {shown(value)}: must be a mapping of options to values; known are {known}"
        )
    else:
        known = f"the groups {', '.join(GROUPS)}, and their options"
        raise StreamlineError(f"{origin}: unknown key {shown(key)}; {_hint(key, [*OPTIONS, *GROUPS], known)}")


def _checked(option: DefinedOption, given: Given) -> Any:
    value, name = given.value, f"{given.origin}: {given.name}"
    if option.option.commas:
        value = _joined(option, value, name)
    if isinstance(value, str) and not _is_text(value):
        raise StreamlineError(f"{name} is {shown(value)}: holds a character that cannot be printed")
    return option.checked(value, name)


def _joined(option: DefinedOption, value: Any, name: str) -> Any:
    """The value as a string with commas. It may be that string, a number, or a list of strings and numbers."""
    items = value if isinstance(value, list) else [value]
    if all(isinstance(each, (int, str)) and not isinstance(each, bool) for each in items):
        return ",".join(str(each) for each in items)
    if isinstance(value, list):
        raise StreamlineError(f"{name} is {shown(value)}: must be one list, or written as {option.option.commas}")
    return value


def _is_text(value: str) -> bool:
    """Whether a string has no control characters, and can be printed or name a file.

    Python reads bytes of a file name that are not UTF-8 as surrogates. Other surrogates are refused.
    """
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
            content = stream.read(_LONGEST_FILE + 1)  # no more: a device file may be endless
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the path
        raise StreamlineError(f"recipe {path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    if len(content) > _LONGEST_FILE:
        raise StreamlineError(f"recipe {path}: is longer than {_LONGEST_FILE} bytes, so it is no recipe")
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
    """The recipe as YAML. `read_recipe` and `make_recipe` make the same recipe from it."""
    return dump_yaml(recipe.to_dict())
