"""Modules chosen by pattern: a layer's number, or a module's name with `*` for any part of it.

What `quantize_exclude` is written in, wherever something is quantized. Knows names only.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from optimum.streamline.errors import StreamlineError

# The first number in a name is its layer's; later ones are experts'.
_LAYER = re.compile(r"^([^0-9]*?\.)(\d+)(?=\.|$)")


def chosen(names: Iterable[str], patterns: Sequence[str]) -> set[str]:
    """The names that these patterns choose.

    Raises:
        StreamlineError: a pattern chooses none.
    """
    found: set[str] = set()
    names = list(names)
    for pattern in patterns:
        named = {name for name in names if matches(name, [pattern])}
        if not named:
            raise StreamlineError(f"quantize-exclude {pattern!r}: {_missing(pattern, names)}")
        found |= named
    return found


def _missing(pattern: str, names: Sequence[str]) -> str:
    layers = [int(match[2]) for match in map(_LAYER.match, names) if match]
    if pattern.isdecimal() and layers:
        return f"there is no layer {pattern}; the model has layers 0 to {max(layers)}"
    example = names[-1] if names else "lm_head"
    return f"no product has this name; give a layer's number or a name such as {example!r} or '*.down_proj'"


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether one of the patterns chooses this name."""
    layer = _LAYER.match(name)
    return any(
        layer is not None and layer[2] == (pattern.lstrip("0") or "0")
        if pattern.isdecimal()
        else fnmatchcase(name, pattern)
        for pattern in patterns
    )


def followed(names: Iterable[str], originals: Sequence[Sequence[int]]) -> list[tuple[str, str]]:
    """What modules of a model are called in a new one whose layers are these layers' successors.

    Args:
        originals: For each layer of the new model, the layers that it stands for.

    Returns:
        New names, each with the old one. Those of layers that are gone are left out.

    >>> followed(["layers.1.up", "layers.3.up", "lm_head"], [[0], [3]])
    [('layers.1.up', 'layers.3.up'), ('lm_head', 'lm_head')]
    """
    pairs: list[tuple[str, str]] = []
    for name in names:
        if layer := _LAYER.match(name):
            new_layers = [place for place, group in enumerate(originals) if int(layer[2]) in group]
            pairs += [(f"{layer[1]}{place}{name[layer.end() :]}", name) for place in new_layers]
        else:
            pairs.append((name, name))
    return pairs
