"""Read and write YAML 1.2 with its core schema, without features that a recipe does not need.

PyYAML reads YAML 1.1: there, `010` is 8, `1:30` is 90, `yes` is true, and a key may appear twice. Here `010` is 10,
`1:30` and `yes` are strings, and a repeated key, a date, a tag, an anchor or an alias is refused. ruamel.yaml reads
YAML 1.2, but would need as much code to refuse these. strictyaml reads every value as a string. Each would be one more
dependency.
"""

from __future__ import annotations

import re
from typing import Any, TypeVar

import yaml

DEEPEST = 8  # levels of nested lists and mappings
_LONGEST_NUMBER = 100  # characters: far more than a float holds, and too few to take time
_LONGEST_MESSAGE = 200

_TAG = "tag:yaml.org,2002:"
_CORE = {
    "null": r"null|Null|NULL|~|",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+",
    "timestamp": r"[0-9]{4}-[0-9]{1,2}-[0-9]{1,2}(?:[Tt \t].*)?",  # from YAML 1.1: recognised in order to refuse it
    "float": r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
}
_BASES = {"0o": 8, "0x": 16}
_Resolver = TypeVar("_Resolver", yaml.SafeLoader, yaml.SafeDumper)


class _Refused(yaml.MarkedYAMLError):
    """The text is valid YAML, but uses a feature that this file does not support."""


class _Loader(yaml.SafeLoader):
    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event: Any = self.peek_event()
        if event.anchor is not None:  # an alias has this field too
            raise _Refused(
                problem="anchors and aliases are not supported; write the value out", problem_mark=event.start_mark
            )
        if event.tag is not None:
            raise _Refused(problem="tags are not supported; leave it out", problem_mark=event.start_mark)
        if self._depth > DEEPEST:
            raise _Refused(problem=f"nested deeper than {DEEPEST} levels", problem_mark=event.start_mark)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _Refused(problem="a key must be a word, not a list or a mapping", problem_mark=key.start_mark)
            if key.value in seen:
                raise _Refused(problem=f"key {key.value!r} appears twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)

    def number(self, node: yaml.ScalarNode) -> int | float:
        if len(node.value) > _LONGEST_NUMBER:
            raise _Refused(
                problem=f"a number of {len(node.value)} characters is too long", problem_mark=node.start_mark
            )
        if node.tag.endswith(":float"):
            return self.construct_yaml_float(node)
        return int(node.value, _BASES.get(node.value[:2], 10))

    def date(self, node: yaml.ScalarNode) -> None:
        raise _Refused(problem="dates are not supported; put text in quotes", problem_mark=node.start_mark)


class _Dumper(yaml.SafeDumper):
    """Writes a string in quotes if YAML 1.1 or YAML 1.2 would read it as another type without them."""


def _with_core_schema(kind: type[_Resolver]) -> type[_Resolver]:
    for name, pattern in _CORE.items():
        kind.add_implicit_resolver(_TAG + name, re.compile(rf"(?:{pattern})\Z"), None)
    return kind


_Loader.yaml_implicit_resolvers = {}  # drop the rules of YAML 1.1
_with_core_schema(_Loader)
_with_core_schema(_Dumper)
for _name, _make in (("int", _Loader.number), ("float", _Loader.number), ("timestamp", _Loader.date)):
    _Loader.add_constructor(_TAG + _name, _make)


def parse_yaml(text: str) -> Any:
    """Parse one document of dicts, lists, strings, numbers, booleans and `None`.

    Raises:
        ValueError: the text is not YAML, or uses a feature that is not supported. The message is one line and names
            the place.
    """
    try:
        return yaml.load(text, _Loader)
    except _Refused as refused:
        raise ValueError(_located(refused)) from None
    except yaml.MarkedYAMLError as error:
        raise ValueError(f"not YAML ({_located(error)})") from None
    except yaml.reader.ReaderError as error:
        raise ValueError(f"not YAML (character {error.position + 1} is not allowed)") from None
    except (ValueError, OverflowError):  # from `chr`, for an escape such as "\U0011FFFF"
        raise ValueError("not YAML (an escape for a character that does not exist)") from None


def dump_yaml(fields: dict[str, Any]) -> str:
    r"""Write fields as YAML that means the same in YAML 1.1 and for `parse_yaml`.

    >>> print(dump_yaml({"layers": "010", "calibration": "2024-01-01", "samples": 10}), end="")
    layers: '010'
    calibration: '2024-01-01'
    samples: 10
    """
    return yaml.dump(fields, Dumper=_Dumper, sort_keys=False)


def _located(error: yaml.MarkedYAMLError) -> str:
    mark = error.problem_mark or error.context_mark
    location = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    return location + _brief(error.problem or error.context or "")


def _brief(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _LONGEST_MESSAGE else line[:_LONGEST_MESSAGE] + "..."
