"""From plain fields or a YAML file to a `Recipe`, and back; every fault becomes one line."""

from __future__ import annotations

import dataclasses
import unicodedata
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from optimum.streamline.errors import StreamlineError, shown

from .recipe import Budget, Recipe
from .yaml12 import dump_yaml, parse_yaml

_LONGEST_FILE = 2**16  # bytes of a recipe


# What a field that has a form of its own should look like.
_FORMS = {
    "heal": "must be none, or one or more of hidden-mse (first), lm and distill, joined by +",
    "budget": "must be limits with their values, such as max_ppl_ratio: 1.1",
    "protect": "must be two numbers, how many of the first and of the last layers, such as 1,1",
}
# What a field of a type takes, where pydantic's words leave that open.
_TYPES = {
    "bool_type": "must be true or false",
    "int_type": "must be an integer",
    "float_type": "must be a number",
    "string_type": "must be a string (in quotes, if it looks like a number)",
}
_LISTS = {"layers": "3,7,11-13", "quantize_exclude": "0,*.mlp.down_proj", "steps": "quantize,prune"}


def make_recipe(fields: dict[str, Any], origin: str = "recipe") -> Recipe:
    """A recipe from plain fields.

    Args:
        origin: What a message calls the fields' source.

    Raises:
        StreamlineError: the first field that is unknown, of another type or out of range, and what would be right.
    """
    _refuse_unknown(Recipe, fields, origin)
    remove = fields.get("remove")
    if remove is not None and (isinstance(remove, bool) or not isinstance(remove, (int, str))):
        raise StreamlineError(f"{origin}: remove is {shown(remove)}: must be a number of layers or a share such as 25%")
    fields = {**fields, **{name: _joined(name, fields[name], origin) for name in _LISTS if name in fields}}
    for name, value in fields.items():
        if isinstance(value, str) and not _is_text(value):
            field = name.replace("_", "-")
            raise StreamlineError(f"{origin}: {field} is {shown(value)}: holds a character that cannot be printed")
    if isinstance(fields.get("budget"), dict):
        _refuse_unknown(Budget, fields["budget"], f"{origin}: budget")
        fields["budget"] = _validated(Budget, fields["budget"], origin, "budget.")
    return _validated(Recipe, fields, origin)


_Fields = TypeVar("_Fields", Budget, Recipe)


def _refuse_unknown(kind: type[Budget | Recipe], fields: dict[str, Any], where: str) -> None:
    known = [field.name for field in dataclasses.fields(kind)]
    for key in fields:
        if key not in known:
            raise StreamlineError(f"{where}: unknown key {shown(key)}; known are {', '.join(known)}")


def _validated(kind: type[_Fields], fields: dict[str, Any], origin: str, prefix: str = "") -> _Fields:
    try:
        return kind(**fields)
    except ValidationError as error:
        first = error.errors()[0]
    field = prefix + str(first["loc"][0]).replace("_", "-")
    message = _TYPES.get(first["type"], first["msg"])
    if first["type"] in ("string_pattern_mismatch", "dataclass_exact_type"):
        message = _FORMS[field]
    raise StreamlineError(f"{origin}: {field} is {shown(first['input'])}: {message}")


def _joined(name: str, value: Any, origin: str) -> Any:
    """What a field that is a list by commas is given: the text itself, one number, or a list of both."""
    items = value if isinstance(value, list) else [value]
    if all(isinstance(each, (int, str)) and not isinstance(each, bool) for each in items):
        return ",".join(str(each) for each in items)
    if isinstance(value, list):
        name, form = name.replace("_", "-"), _LISTS[name]
        raise StreamlineError(f"{origin}: {name} is {shown(value)}: must be one list, or written as {form}")
    return value


def _is_text(value: str) -> bool:
    """Whether it could name a file (bytes of one that are no UTF-8 are surrogates) and has no control characters."""
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
