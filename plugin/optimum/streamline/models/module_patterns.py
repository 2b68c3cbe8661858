"""Select modules by pattern: a layer index, or a module name in which `*` stands for any characters.

The option `quantize_exclude` takes such patterns, in every place that quantizes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from optimum.streamline.errors import StreamlineError

# The first number in a module name is the layer index. Later numbers are indices of experts.
_LAYER = re.compile(r"^([^0-9]*?\.)(\d+)(?=\.|$)")


def select_modules(names: Iterable[str], patterns: Sequence[str]) -> set[str]:
    """Select the module names that match at least one pattern.

    Args:
        names: The names of all linear modules.
        patterns: Layer indices or name patterns.

    Returns:
        The matching names.

    Raises:
        StreamlineError: a pattern matches no name.
    """
    selected: set[str] = set()
    names = list(names)
    for pattern in patterns:
        matching = {name for name in names if matches_any(name, [pattern])}
        if not matching:
            raise StreamlineError(f"quantize-exclude {pattern!r}: {_why_no_match(pattern, names)}")
        selected |= matching
    return selected


def _why_no_match(pattern: str, names: Sequence[str]) -> str:
    """The part of an error message that says why `pattern` matches nothing."""
    layers = [int(match[2]) for match in map(_LAYER.match, names) if match]
    if pattern.isdecimal() and layers:
        return f"there is no layer {pattern}; the model has layers 0 to {max(layers)}"
    example = names[-1] if names else "lm_head"
    return f"no linear module has this name; give a layer index, or a name such as {example!r} or '*.down_proj'"


def matches_any(name: str, patterns: Iterable[str]) -> bool:
    """Whether a module name matches at least one pattern.

    Args:
        name: A module name, such as `model.layers.3.mlp.down_proj`.
        patterns: Layer indices, such as `3`, or name patterns, such as `*.down_proj`.
    """
    layer = _LAYER.match(name)
    return any(
        layer is not None and layer[2] == (pattern.lstrip("0") or "0")
        if pattern.isdecimal()
        else fnmatchcase(name, pattern)
        for pattern in patterns
    )


def within(module: str, parts: Iterable[str]) -> bool:
    """Whether a module of a layer is one of the modules `parts`, or inside one; all are dotted paths in the layer.

    >>> within("mlp.up_proj", ["mlp"]), within("mlp_norm", ["mlp"])
    (True, False)
    """
    return any(f"{module}.".startswith(f"{part}.") for part in parts)


def renumbered_names(
    names: Iterable[str],
    originals: Sequence[Sequence[int]],
    mlp_originals: Sequence[Sequence[int]] | None = None,
    mlp_part: Sequence[str] = (),
) -> list[tuple[str, str]]:
    """Give the linear modules of an edited model their new names.

    Args:
        names: Module names in the old model.
        originals: For each layer of the new model, the indices of the old layers that it stands for.
        mlp_originals: The same for its MLP alone; by default `originals`.
        mlp_part: The modules of the MLP in a layer (`Architecture.mlp_part`), needed with `mlp_originals`.

    Returns:
        Pairs of new name and old name. Names in removed layers are left out; a name outside the layers stays.

    >>> renumbered_names(["layers.1.up", "layers.3.up", "lm_head"], [[0], [3]])
    [('layers.1.up', 'layers.3.up'), ('lm_head', 'lm_head')]
    """
    pairs: list[tuple[str, str]] = []
    for name in names:
        if layer := _LAYER.match(name):
            module = name[layer.end() + 1 :]
            groups = mlp_originals if mlp_originals is not None and within(module, mlp_part) else originals
            new_layers = [index for index, group in enumerate(groups) if int(layer[2]) in group]
            pairs += [(f"{layer[1]}{index}{name[layer.end() :]}", name) for index in new_layers]
        else:
            pairs.append((name, name))
    return pairs
