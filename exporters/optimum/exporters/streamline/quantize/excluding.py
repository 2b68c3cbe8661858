"""Which products of a graph are left as they are: by layer, or by the name of their module."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import onnx_ir as ir

from optimum.streamline.module_patterns import chosen


def module_of(node: ir.Node) -> str:
    """The module a node of a named graph came from, `model.layers.3.mlp.up_proj`."""
    return str(node.name).rpartition("/")[0]


def excluded(nodes: Iterable[ir.Node], patterns: Sequence[str]) -> set[ir.Node]:
    """The nodes that these patterns name: a layer's number, or a module's name with `*` for any part of it.

    Raises:
        StreamlineError: a pattern names none.
    """
    modules = {node: module_of(node) for node in nodes}
    names = chosen(modules.values(), patterns)
    return {node for node, module in modules.items() if module in names}
