"""Copy each traced layer to the place of every other layer of its kind, so that few traced layers give the whole graph.

The tracer records on each node the module it came from; these names tell which nodes belong to which layer. A layer
reads the hidden state, its own weights, its own cache entry, and values that all layers share (masks, rotary angles,
shapes). A copy gets new weights, a new cache entry and the hidden state of the layer before it; shared values are not
copied. The code works for every architecture. `parity/compare.py` checks the resulting graph against torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from optimum.exporters.streamline.rewriting.public_names import TRACED_CACHE, scopes, set_scopes


class CannotStampError(Exception):
    """A layer of the graph is not a separable part, so it cannot be copied; the message says why."""


@dataclass(frozen=True)
class LayerMap:
    """Which traced layer represents which layer of the model.

    Args:
        path: The module path of the layer list in the model, such as `model.layers`.
        traced: The model's indices of the traced layers, in rising order; the first is 0.
        templates: For each layer of the model, the position in `traced` of the layer that represents it.
        traced_caches: For each traced layer, the index of its cache entry in the traced graph; `None` for a layer
            without attention.
        caches: For each layer of the model, the index of its cache entry in the whole graph; `None` as above.
    """

    path: str
    traced: Sequence[int]
    templates: Sequence[int]
    traced_caches: Sequence[int | None]
    caches: Sequence[int | None]


@dataclass(frozen=True)
class _TracedLayer:
    """One traced layer, as a part of the graph.

    Args:
        prefix: The prefix of its weights' names.
        nodes: All its nodes, in order.
        own: The nodes whose result depends on this layer's input, weights or cache; the other nodes compute values
            that all layers share.
        entry: The hidden state that it reads; `None` for the first layer, where it is not needed.
        exit: The hidden state that it returns; `entry` if it adds nothing.
    """

    prefix: str
    nodes: list[ir.Node]
    own: list[ir.Node]
    entry: ir.Value | None
    exit: ir.Value


@dataclass(frozen=True)
class _Copy:
    """A copied layer: its output hidden state, and everything that must be added to the graph."""

    exit: ir.Value
    nodes: list[ir.Node]
    weights: list[ir.Value]
    inputs: list[ir.Value]
    outputs: list[ir.Value]


def stamp(model: ir.Model, layers: LayerMap) -> list[ir.Value]:
    """Turn a graph of the traced layers into the graph of all layers, in place.

    Args:
        model: The traced graph. Its weights are initializers, named as in the traced model.
        layers: Which traced layer represents which layer of the model.

    Returns:
        The output hidden state of each layer, `[batch, length, width]`, first to last. A layer that adds nothing has
        the same one as the layer before it.

    Raises:
        CannotStampError: other parts of the graph read more than one output of a layer, or none. The graph is then
            unchanged.
    """
    graph = model.graph
    traced = _traced_layers(graph, layers)
    uses_after_layers = [use for use in traced[-1].exit.uses() if use.node not in traced[-1].nodes]
    copies: dict[int, _Copy] = {}
    hidden = traced[0].exit
    all_hidden = [hidden]
    for index, position in list(enumerate(layers.templates))[1:]:
        template = traced[position]
        if layers.traced[position] != index:
            copies[index] = _copy(template, hidden, layers, position, index)
            hidden = copies[index].exit
        elif template.exit is not template.entry:
            hidden = template.exit
        all_hidden.append(hidden)
    for layer, index in list(zip(traced, layers.traced, strict=True))[1:]:
        _replace_input(layer.nodes, layer.entry, all_hidden[index - 1])
    for node, input_index in uses_after_layers:
        node.replace_input_with(input_index, hidden)
    _renumber_traced(graph, layers, traced)
    for copy in copies.values():
        _add(graph, copy)
    graph.sort()
    return all_hidden


def first_layer_input(graph: ir.Graph, layers: LayerMap) -> ir.Value | None:
    """The hidden state that the first layer of a traced graph reads; `None` if it cannot be identified.

    It is the one value from outside the layer that has the shape of the layer's output.
    """
    nodes = _nodes_by_layer(graph, layers)[0]
    weights = _weights(nodes, f"{layers.path}.0.")
    exits = _outputs_read_outside(nodes, _dependents(nodes, weights))
    inside = set(nodes)
    shapes = [each.shape for each in exits]
    outside = [value for value in _inputs(nodes) if not value.is_initializer() and value.producer() not in inside]
    candidates = [value for value in outside if value.shape is not None and value.shape in shapes]
    return candidates[0] if len(candidates) == 1 else None


def _traced_layers(graph: ir.Graph, layers: LayerMap) -> list[_TracedLayer]:
    traced: list[_TracedLayer] = []
    for position, nodes in enumerate(_nodes_by_layer(graph, layers)):
        traced.append(_traced_layer(nodes, traced[-1].exit if traced else None, layers, position))
    return traced


def _traced_layer(nodes: list[ir.Node], entry: ir.Value | None, layers: LayerMap, position: int) -> _TracedLayer:
    index, prefix = layers.traced[position], f"{layers.path}.{position}."
    weights, caches = _weights(nodes, prefix), _caches(nodes, layers.traced_caches[position])
    exits = _outputs_read_outside(nodes, _dependents(nodes, weights))
    if not exits and entry is not None:
        exits = [entry]
    if len(exits) != 1:
        names = ", ".join(str(value.name) for value in exits) or "none"
        raise CannotStampError(f"layer {index} should have one output, it has {names}")
    own = _dependents(nodes, [*weights, *caches, *([entry] if entry else [])])
    if any(_has_subgraph(node) for node in own):
        raise CannotStampError(f"layer {index} has a node with a subgraph")
    return _TracedLayer(prefix, nodes, own, entry, exits[0])


def _nodes_by_layer(graph: ir.Graph, layers: LayerMap) -> list[list[ir.Node]]:
    """The nodes of each traced layer.

    Optimizations drop the module name of some nodes. Such a node belongs to the last layer that it depends on, if a
    node of some layer depends on it.
    """
    nodes = list(graph)
    named = {node: position for node in nodes if (position := _layer_position(node, layers)) is not None}
    after: dict[ir.Node, int] = {}
    for node in nodes:
        positions = [after[each] for each in node.predecessors() if each in after]
        if node in named or positions:
            after[node] = named[node] if node in named else max(positions)
    before_a_layer = set(named)
    for node in reversed(nodes):
        if any(each in before_a_layer for each in node.successors()):
            before_a_layer.add(node)
    by_layer: list[list[ir.Node]] = [[] for _ in layers.traced]
    for node in nodes:
        if node in after and node in before_a_layer:
            by_layer[after[node]].append(node)
    return by_layer


def _layer_position(node: ir.Node, layers: LayerMap) -> int | None:
    for scope in scopes(node):
        if match := re.fullmatch(rf"{re.escape(layers.path)}\.(\d+)", scope):
            return int(match[1])
    return None


def _weights(nodes: Iterable[ir.Node], prefix: str) -> list[ir.Value]:
    return [value for value in _inputs(nodes) if value.is_initializer() and str(value.name).startswith(prefix)]


def _caches(nodes: Iterable[ir.Node], number: int | None) -> list[ir.Value]:
    return [value for value in _inputs(nodes) if value.is_graph_input() and _cache_number(value) == number is not None]


def _inputs(nodes: Iterable[ir.Node]) -> Iterator[ir.Value]:
    """Every value that the nodes read, once each."""
    unique = {value: None for node in nodes for value in node.inputs if value is not None}
    return iter(unique)


def _cache_number(value: ir.Value) -> int | None:
    match = TRACED_CACHE.fullmatch(str(value.name))
    return int(match[1]) if match else None


def _dependents(nodes: Iterable[ir.Node], seeds: Iterable[ir.Value]) -> list[ir.Node]:
    """The nodes whose result depends on one of the seeds; `nodes` must be in topological order."""
    reached, dependents = set(seeds), []
    for node in nodes:
        if any(value in reached for value in node.inputs):
            dependents.append(node)
            reached.update(node.outputs)
    return dependents


def _outputs_read_outside(layer: Iterable[ir.Node], nodes: Iterable[ir.Node]) -> list[ir.Value]:
    """The outputs of `nodes` that a node outside the layer reads; not shapes, which are equal in all layers."""
    inside = set(layer)
    outputs = [value for node in nodes for value in node.outputs if any(use.node not in inside for use in value.uses())]
    return [value for value in outputs if value.dtype is None or value.dtype.is_floating_point()]


def _has_subgraph(node: ir.Node) -> bool:
    return any(each.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for each in node.attributes.values())


def _copy(template: _TracedLayer, hidden: ir.Value, layers: LayerMap, position: int, index: int) -> _Copy:
    """Copy the traced layer at `position` as layer `index` of the model, which reads the hidden state `hidden`."""
    assert template.entry is not None  # only the first layer has none, and it is never copied
    prefix, number = f"{layers.path}.{index}.", layers.caches[index]
    old_weights = _weights(template.own, template.prefix)
    weights = {value: _like(value, _renamed_weight(value, template.prefix, prefix)) for value in old_weights}
    cache_inputs = _caches(template.own, layers.traced_caches[position])
    inputs = {value: _like(value, _renumbered(value, number)) for value in cache_inputs}
    mapping = {template.entry: hidden, **weights, **inputs}
    nodes = [_copy_node(node, mapping, template.prefix, prefix) for node in template.own]
    old_outputs = [value for node in template.own for value in node.outputs if value.is_graph_output()]
    for value in old_outputs:
        mapping[value].name = _renumbered(value, number)
    outputs = [mapping[value] for value in old_outputs]
    return _Copy(mapping[template.exit], nodes, list(weights.values()), list(inputs.values()), outputs)


def _copy_node(node: ir.Node, mapping: dict[ir.Value, ir.Value], old: str, new: str) -> ir.Node:
    """Copy a node; `mapping` translates its inputs, and gains its outputs.

    Args:
        node: The node.
        mapping: The copy of each value copied so far.
        old: The prefix of the template's module names.
        new: The prefix that replaces it.
    """
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


def _renamed_weight(value: ir.Value, old: str, new: str) -> str:
    return new + str(value.name).removeprefix(old)


def _renumbered(value: ir.Value, number: int | None) -> str:
    """The name of a cache input or output, with another index of its cache entry."""
    name = str(value.name)
    match = TRACED_CACHE.fullmatch(name)
    assert match is not None
    return f"{name[: match.start(1)]}{number}{name[match.end(1) :]}"


def _replace_input(nodes: Iterable[ir.Node], old: ir.Value | None, new: ir.Value) -> None:
    """Make the nodes read `new` in place of `old`."""
    for node in nodes:
        for input_index, value in enumerate(node.inputs):
            if value is old is not None:
                node.replace_input_with(input_index, new)


def _renumber_traced(graph: ir.Graph, layers: LayerMap, traced: Iterable[_TracedLayer]) -> None:
    """Rename the traced layers' weights, modules and cache entries by the layers' indices in the model."""
    weights: list[tuple[ir.Value, str]] = []
    for layer, index in zip(traced, layers.traced, strict=True):
        prefix = f"{layers.path}.{index}."
        for value in _weights(layer.nodes, layer.prefix):
            weights.append((value, _renamed_weight(value, layer.prefix, prefix)))
        for node in layer.nodes:
            set_scopes(node, [f"{scope}.".replace(layer.prefix, prefix, 1)[:-1] for scope in scopes(node)])
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
