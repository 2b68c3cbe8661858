"""The graph of a whole model from that of a few of its layers: each is traced once, and stamped out where it recurs.

A layer's part of a traced graph is found by the module names that the tracer leaves on nodes. What enters it is the
hidden state, the layer's weights, its cache entry, and values that are the same for all layers (masks, rotary angles,
shapes), which stay where they were made. Knows no architecture; whether the result is right, `compare.py` judges.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from optimum.exporters.streamline.rewriting.public_names import TRACED_CACHE, scopes, set_scopes


class CannotStampError(Exception):
    """The layers of a graph are not parts that can be copied; says why."""


@dataclass(frozen=True)
class Layers:
    """How the layers of a traced graph stand for those of a model.

    Args:
        path: Where the layers are in the model, `model.layers`.
        traced: The numbers, in the model, of the layers that were traced, rising; the first of them is 0.
        templates: For each layer of the model, the place among `traced` of the one that stands for it.
        traced_caches: For each traced layer, the number of its cache entry in the graph; none without an attention.
        caches: For each layer of the model, the number of its cache entry.
    """

    path: str
    traced: Sequence[int]
    templates: Sequence[int]
    traced_caches: Sequence[int | None]
    caches: Sequence[int | None]


@dataclass(frozen=True)
class _Part:
    """A traced layer's part of the graph.

    Args:
        prefix: What the names of its weights begin with.
        nodes: Its nodes, in order.
        own: Those of the nodes that compute something of this layer's own; the others serve all layers.
        entry: The hidden state that enters it; unknown for the first layer.
        exit: The hidden state that leaves it; `entry` where nothing is added to it.
    """

    prefix: str
    nodes: list[ir.Node]
    own: list[ir.Node]
    entry: ir.Value | None
    exit: ir.Value


@dataclass(frozen=True)
class _Copy:
    """A layer stamped out: all that is to be added to the graph."""

    exit: ir.Value
    nodes: list[ir.Node]
    weights: list[ir.Value]
    inputs: list[ir.Value]
    outputs: list[ir.Value]


def stamp(model: ir.Model, layers: Layers) -> list[ir.Value]:
    """Make the graph of a few layers that of all, in place.

    Args:
        model: Its weights are initializers under the names they have in the traced model.

    Returns:
        The hidden states that leave the layers, first to last; twice the same where a layer adds nothing.

    Raises:
        CannotStampError: a layer's part of the graph has more ways out than the hidden state, or none. The graph is
            as it was.
    """
    graph = model.graph
    parts = _parts(graph, layers)
    behind = [use for use in parts[-1].exit.uses() if use.node not in parts[-1].nodes]
    copies: dict[int, _Copy] = {}
    stream = parts[0].exit
    streams = [stream]
    for index, place in list(enumerate(layers.templates))[1:]:
        part = parts[place]
        if layers.traced[place] != index:
            copies[index] = _copy(part, stream, layers, place, index)
            stream = copies[index].exit
        elif part.exit is not part.entry:
            stream = part.exit
        streams.append(stream)
    for part, index in list(zip(parts, layers.traced, strict=True))[1:]:
        _feed(part.nodes, part.entry, streams[index - 1])
    for node, position in behind:
        node.replace_input_with(position, stream)
    _renumber_traced(graph, layers, parts)
    for copy in copies.values():
        _add(graph, copy)
    graph.sort()
    return streams


def entering(graph: ir.Graph, layers: Layers) -> ir.Value | None:
    """The hidden state that enters the first layer of a traced graph; `None` where it cannot be told.

    It is what has the shape of the hidden state that leaves that layer, and is not its own doing.
    """
    nodes = _nodes_by_layer(graph, layers)[0]
    weights = _weights(nodes, f"{layers.path}.0.")
    exits = _ways_out(nodes, _followers(nodes, weights))
    inside = set(nodes)
    shapes = [each.shape for each in exits]
    outside = [value for value in _inputs(nodes) if not value.is_initializer() and value.producer() not in inside]
    found = [value for value in outside if value.shape is not None and value.shape in shapes]
    return found[0] if len(found) == 1 else None


def _parts(graph: ir.Graph, layers: Layers) -> list[_Part]:
    parts: list[_Part] = []
    for place, nodes in enumerate(_nodes_by_layer(graph, layers)):
        parts.append(_part(nodes, parts[-1].exit if parts else None, layers, place))
    return parts


def _part(nodes: list[ir.Node], entry: ir.Value | None, layers: Layers, place: int) -> _Part:
    index, prefix = layers.traced[place], f"{layers.path}.{place}."
    weights, caches = _weights(nodes, prefix), _caches(nodes, layers.traced_caches[place])
    exits = _ways_out(nodes, _followers(nodes, weights))
    if not exits and entry is not None:
        exits = [entry]
    if len(exits) != 1:
        found = ", ".join(str(value.name) for value in exits) or "none"
        raise CannotStampError(f"layer {index} should have one output, it has {found}")
    own = _followers(nodes, [*weights, *caches, *([entry] if entry else [])])
    if any(_has_graph(node) for node in own):
        raise CannotStampError(f"layer {index} has a graph within its graph")
    return _Part(prefix, nodes, own, entry, exits[0])


def _nodes_by_layer(graph: ir.Graph, layers: Layers) -> list[list[ir.Node]]:
    """For each traced layer its nodes. One whose name was lost belongs to a layer if it follows it and feeds one."""
    nodes = list(graph)
    named = {node: place for node in nodes if (place := _place(node, layers)) is not None}
    after: dict[ir.Node, int] = {}
    for node in nodes:
        places = [after[each] for each in node.predecessors() if each in after]
        if node in named or places:
            after[node] = named[node] if node in named else max(places)
    feeding = set(named)
    for node in reversed(nodes):
        if any(each in feeding for each in node.successors()):
            feeding.add(node)
    found: list[list[ir.Node]] = [[] for _ in layers.traced]
    for node in nodes:
        if node in after and node in feeding:
            found[after[node]].append(node)
    return found


def _place(node: ir.Node, layers: Layers) -> int | None:
    for scope in scopes(node):
        if match := re.fullmatch(rf"{re.escape(layers.path)}\.(\d+)", scope):
            return int(match[1])
    return None


def _weights(nodes: Iterable[ir.Node], prefix: str) -> list[ir.Value]:
    return [value for value in _inputs(nodes) if value.is_initializer() and str(value.name).startswith(prefix)]


def _caches(nodes: Iterable[ir.Node], number: int | None) -> list[ir.Value]:
    return [value for value in _inputs(nodes) if value.is_graph_input() and _cache_number(value) == number is not None]


def _inputs(nodes: Iterable[ir.Node]) -> Iterator[ir.Value]:
    seen = {value: None for node in nodes for value in node.inputs if value is not None}
    return iter(seen)


def _cache_number(value: ir.Value) -> int | None:
    match = TRACED_CACHE.fullmatch(str(value.name))
    return int(match[1]) if match else None


def _followers(nodes: Iterable[ir.Node], seeds: Iterable[ir.Value]) -> list[ir.Node]:
    """Those of the nodes, given in order, that compute something from the seeds."""
    reached, following = set(seeds), []
    for node in nodes:
        if any(value in reached for value in node.inputs):
            following.append(node)
            reached.update(node.outputs)
    return following


def _ways_out(part: Iterable[ir.Node], nodes: Iterable[ir.Node]) -> list[ir.Value]:
    """What other parts read of these nodes' outputs; shapes apart, which are the same in all layers."""
    inside = set(part)
    outputs = [value for node in nodes for value in node.outputs if any(use.node not in inside for use in value.uses())]
    return [value for value in outputs if value.dtype is None or value.dtype.is_floating_point()]


def _has_graph(node: ir.Node) -> bool:
    return any(each.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for each in node.attributes.values())


def _copy(part: _Part, entering: ir.Value, layers: Layers, place: int, index: int) -> _Copy:
    """The part of traced layer `place` once more, for layer `index` of the model."""
    assert part.entry is not None  # only the first layer's is unknown, and that is never copied
    prefix, number = f"{layers.path}.{index}.", layers.caches[index]
    weights = {value: _like(value, _moved(value, part.prefix, prefix)) for value in _weights(part.own, part.prefix)}
    cached = _caches(part.own, layers.traced_caches[place])
    inputs = {value: _like(value, _renumbered(value, number)) for value in cached}
    mapping = {part.entry: entering, **weights, **inputs}
    nodes = [_copy_node(node, mapping, part.prefix, prefix) for node in part.own]
    outputs = [value for node in part.own for value in node.outputs if value.is_graph_output()]
    for value in outputs:
        mapping[value].name = _renumbered(value, number)
    made = [mapping[value] for value in outputs]
    return _Copy(mapping[part.exit], nodes, list(weights.values()), list(inputs.values()), made)


def _copy_node(node: ir.Node, mapping: dict[ir.Value, ir.Value], old: str, new: str) -> ir.Node:
    """The node once more, its inputs by `mapping`, which its outputs are added to."""
    copy = ir.Node(
        node.domain,
        node.op_type,
        [value if value is None else mapping.get(value, value) for value in node.inputs],
        node.attributes.values(),
        outputs=[_like(value, None) for value in node.outputs],
        version=node.version,
        metadata_props=dict(node.metadata_props),
    )
    mapping.update(zip(node.outputs, copy.outputs, strict=True))
    set_scopes(copy, [f"{scope}.".replace(old, new, 1)[:-1] for scope in scopes(node)])
    return copy


def _like(value: ir.Value, name: str | None) -> ir.Value:
    return ir.Value(name=name, shape=value.shape, type=value.type)


def _moved(value: ir.Value, old: str, new: str) -> str:
    return new + str(value.name).removeprefix(old)


def _renumbered(value: ir.Value, number: int | None) -> str:
    name = str(value.name)
    match = TRACED_CACHE.fullmatch(name)
    assert match is not None
    return f"{name[: match.start(1)]}{number}{name[match.end(1) :]}"


def _feed(nodes: Iterable[ir.Node], old: ir.Value | None, new: ir.Value) -> None:
    """Let nodes read `new` where they read `old`."""
    for node in nodes:
        for position, value in enumerate(node.inputs):
            if value is old is not None:
                node.replace_input_with(position, new)


def _renumber_traced(graph: ir.Graph, layers: Layers, parts: Iterable[_Part]) -> None:
    """Give what belongs to the traced layers the numbers they have in the model."""
    weights: list[tuple[ir.Value, str]] = []
    for part, index in zip(parts, layers.traced, strict=True):
        prefix = f"{layers.path}.{index}."
        weights += [(value, _moved(value, part.prefix, prefix)) for value in _weights(part.nodes, part.prefix)]
        for node in part.nodes:
            set_scopes(node, [f"{scope}.".replace(part.prefix, prefix, 1)[:-1] for scope in scopes(node)])
    for value, _ in weights:
        graph.initializers.pop(str(value.name))
    for value, name in weights:
        value.name = name
        graph.initializers[name] = value
    numbers = {old: layers.caches[index] for old, index in zip(layers.traced_caches, layers.traced, strict=True)}
    for value in (*graph.inputs, *graph.outputs):
        if (number := _cache_number(value)) is not None:
            value.name = _renumbered(value, numbers[number])


def _add(graph: ir.Graph, copy: _Copy) -> None:
    graph.extend(copy.nodes)
    graph.inputs.extend(copy.inputs)
    graph.outputs.extend(copy.outputs)
    for value in copy.weights:
        graph.initializers[str(value.name)] = value
