"""Which products of a graph are left as they are: by layer, or by the name of their module."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

import onnx_ir as ir

from optimum.streamline.errors import StreamlineError


def module_of(node: ir.Node) -> str:
    """The module a node of a named graph came from, `model.layers.3.mlp.up_proj`."""
    return str(node.name).rpartition("/")[0]


def excluded(nodes: Iterable[ir.Node], patterns: Sequence[str]) -> set[ir.Node]:
    """The nodes that these patterns name: a layer's number, or a module's name with `*` for any part of it.

    Raises:
        StreamlineError: a pattern names none.
    """
    found: set[ir.Node] = set()
    nodes = list(nodes)
    for pattern in patterns:
        named = {node for node in nodes if _matches(module_of(node), pattern)}
        if not named:
            example = module_of(nodes[-1]) if nodes else "lm_head"
            raise StreamlineError(
                f"quantize-exclude {pattern!r}: no product has this layer or module; give a layer's number or a name "
                f"such as {example!r} or '*.down_proj'"
            )
        found |= named
    return found


def _matches(module: str, pattern: str) -> bool:
    if pattern.isdecimal():
        return re.search(rf"\.{int(pattern)}(\.|$)", module) is not None
    return fnmatchcase(module, pattern)
