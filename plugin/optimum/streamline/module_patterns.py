"""Modules chosen by pattern: a layer's number, or a module's name with `*` for any part of it.

What `quantize_exclude` is written in, wherever something is quantized. Knows names only.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from .errors import StreamlineError

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
        named = {name for name in names if _matches(name, pattern)}
        if not named:
            example = names[-1] if names else "lm_head"
            raise StreamlineError(
                f"quantize-exclude {pattern!r}: no product has this layer or module; give a layer's number or a name "
                f"such as {example!r} or '*.down_proj'"
            )
        found |= named
    return found


def check_layers(patterns: Sequence[str], total: int) -> None:
    """Refuse the number of a layer that is not there, of `total`.

    Raises:
        StreamlineError: naming it.
    """
    for pattern in patterns:
        if pattern.isdecimal() and int(pattern) >= total:
            raise StreamlineError(
                f"quantize-exclude {pattern!r}: there is no layer {pattern}; the model has layers 0 to {total - 1}"
            )


def _matches(name: str, pattern: str) -> bool:
    if pattern.isdecimal():
        layer = _LAYER.match(name)
        return layer is not None and int(layer[2]) == int(pattern)
    return fnmatchcase(name, pattern)


def followed(patterns: Sequence[str], originals: Sequence[Sequence[int]]) -> list[str]:
    """The same patterns for a model whose layers are other layers' successors; what named only gone layers is gone.

    Args:
        originals: For each layer of the new model, the layers that it stands for.

    >>> followed(["3", "lm_head", "model.layers.5.mlp.*", "4"], [[0], [3], [5, 6]])
    ['1', 'lm_head', 'model.layers.2.mlp.*']
    """
    new: list[str] = []
    for pattern in patterns:
        layer = _LAYER.match(pattern)
        number = pattern if pattern.isdecimal() else layer and layer[2]
        if not number:
            new.append(pattern)
            continue
        places = [place for place, group in enumerate(originals) if int(number) in group]
        if pattern.isdecimal():
            new += map(str, places)
        elif layer:
            new += [f"{layer[1]}{place}{pattern[layer.end() :]}" for place in places]
    return new
