"""Reading and writing YAML by the core schema of YAML 1.2, without features that a recipe does not need.

PyYAML reads YAML 1.1, where `010` is 8, `1:30` is 90, `yes` is true and a key may stand twice. Here `010` is 10, the
other two are text, and a repeated key, a date, a tag, an anchor or an alias is refused. ruamel.yaml, which reads YAML
1.2, would need as much code to refuse these, and strictyaml makes text of every value; both would be one more
dependency.
"""

from __future__ import annotations

import re
from typing import Any, TypeVar

import yaml

DEEPEST = 8  # lists and mappings in one another
_LONGEST_NUMBER = 100  # characters: far more than a float holds, and too few to take time
_LONGEST_MESSAGE = 200

_TAG = "tag:yaml.org,2002:"
_CORE = {
    "null": r"null|Null|NULL|~|",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+",
    "timestamp": r"[0-9]{4}-[0-9]{1,2}-[0-9]{1,2}(?:[Tt \t].*)?",  # of YAML 1.1: known so that it can be refused
    "float": r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
}
_BASES = {"0o": 8, "0x": 16}
_Resolver = TypeVar("_Resolver", yaml.SafeLoader, yaml.SafeDumper)


class _Refused(yaml.MarkedYAMLError):
    """Valid YAML that is not read."""


class _Loader(yaml.SafeLoader):
    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event: Any = self.peek_event()
        if event.anchor is not None:  # an alias has one, too
            raise _Refused(
                problem="anchors and aliases are not read; write the value out", problem_mark=event.start_mark
            )
        if event.tag is not None:
            raise _Refused(problem="tags are not read; leave it out", problem_mark=event.start_mark)
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
                raise _Refused(problem=f"key {key.value!r} stands twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)

    def number(self, node: yaml.ScalarNode) -> int | float:
        if len(node.value) > _LONGEST_NUMBER:
            raise _Refused(problem=f"a number of {len(node.value)} characters", problem_mark=node.start_mark)
        if node.tag.endswith(":float"):
            return self.construct_yaml_float(node)
        return int(node.value, _BASES.get(node.value[:2], 10))

    def date(self, node: yaml.ScalarNode) -> None:
        raise _Refused(problem="a date is not read; put text in quotes", problem_mark=node.start_mark)


class _Dumper(yaml.SafeDumper):
    """Puts in quotes what either version of YAML would not read as text."""


def _with_core_schema(kind: type[_Resolver]) -> type[_Resolver]:
    for name, pattern in _CORE.items():
        kind.add_implicit_resolver(_TAG + name, re.compile(rf"(?:{pattern})\Z"), None)
    return kind


_Loader.yaml_implicit_resolvers = {}  # but not those of YAML 1.1
_with_core_schema(_Loader)
_with_core_schema(_Dumper)
for _name, _make in (("int", _Loader.number), ("float", _Loader.number), ("timestamp", _Loader.date)):
    _Loader.add_constructor(_TAG + _name, _make)


def parse_yaml(text: str) -> Any:
    """The one document in `text`, made of dicts, lists, strings, numbers, booleans and `None`.

    Raises:
        ValueError: it is not YAML, or holds something that is not read; one line that says what and where.
    """
    try:
        return yaml.load(text, _Loader)
    except _Refused as refused:
        raise ValueError(_place(refused)) from None
    except yaml.MarkedYAMLError as error:
        raise ValueError(f"not YAML ({_place(error)})") from None
    except yaml.reader.ReaderError as error:
        raise ValueError(f"not YAML (character {error.position + 1}: must not be in a file)") from None
    except (ValueError, OverflowError):  # of an escape such as "\U0011FFFF", from `chr`
        raise ValueError("not YAML (an escape for a character that does not exist)") from None


def dump_yaml(fields: dict[str, Any]) -> str:
    r"""The fields as YAML, which `parse_yaml` and YAML 1.1 read alike.

    >>> print(dump_yaml({"layers": "010", "calibration": "2024-01-01", "samples": 10}), end="")
    layers: '010'
    calibration: '2024-01-01'
    samples: 10
    """
    return yaml.dump(fields, Dumper=_Dumper, sort_keys=False)


def _place(error: yaml.MarkedYAMLError) -> str:
    mark = error.problem_mark or error.context_mark
    place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    return place + _brief(error.problem or error.context or "")


def _brief(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _LONGEST_MESSAGE else line[:_LONGEST_MESSAGE] + "..."
