"""Packing: arranging the attentions and MLPs that an edit leaves in as few decoder layers as possible.

A decoder layer computes an attention and then an MLP, each with its own norm, and adds each to the residual stream. So
an attention and the MLP that follows it make one ordinary layer, whatever layers they come from, and compute the same.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from optimum.streamline.models.removed_sublayers import SublayerKey
from optimum.streamline.models.skipped_sublayers import ATTENTION, MLP


def sublayers_left(total: int, removed: Iterable[SublayerKey]) -> tuple[SublayerKey, ...]:
    """The sublayers of a model with `total` layers that are not in `removed`, in the order in which they compute."""
    gone = set(removed)
    return tuple((layer, kind) for layer in range(total) for kind in (ATTENTION, MLP) if (layer, kind) not in gone)


def packed(row: Iterable[SublayerKey]) -> tuple[tuple[SublayerKey, ...], ...]:
    """Arrange sublayers in the fewest layers.

    Args:
        row: The sublayers in the order in which they compute.

    Returns:
        The sublayers of each layer: an attention and the MLP after it, or one sublayer alone.

    >>> packed([(0, "attention"), (2, "mlp"), (3, "mlp")])
    (((0, 'attention'), (2, 'mlp')), ((3, 'mlp'),))
    """
    layers: list[tuple[SublayerKey, ...]] = []
    for sublayer in row:
        if layers and len(layers[-1]) == 1 and layers[-1][0][1] == ATTENTION and sublayer[1] == MLP:
            layers[-1] += (sublayer,)
        else:
            layers.append((sublayer,))
    return tuple(layers)


def gaps(
    total: int, removed: Collection[SublayerKey], earlier: Collection[SublayerKey] = ()
) -> tuple[tuple[SublayerKey | None, tuple[SublayerKey, ...]], ...]:
    """The runs of removed sublayers, each after the sublayer before it that stays; `None` where there is none.

    Args:
        total: The number of layers of the original.
        removed: The sublayers that are removed.
        earlier: The sublayers that the original skips already; they are no part of a run.

    >>> gaps(3, {(0, "mlp"), (1, "attention"), (2, "mlp")})
    (((0, 'attention'), ((0, 'mlp'), (1, 'attention'))), ((2, 'attention'), ((2, 'mlp'),)))
    """
    found, last, in_gap = list[tuple[SublayerKey | None, tuple[SublayerKey, ...]]](), None, False
    for sublayer in sublayers_left(total, earlier):
        if sublayer not in removed:
            last, in_gap = sublayer, False
        elif in_gap:
            found[-1] = (last, (*found[-1][1], sublayer))
        else:
            found.append((last, (sublayer,)))
            in_gap = True
    return tuple(found)


def mlps_after_gaps(
    total: int, removed: Collection[SublayerKey], earlier: Collection[SublayerKey] = ()
) -> tuple[int, ...]:
    """The layers of the first MLP after each run of removed sublayers, in rising order. A run at the end has none.

    Args:
        total: The number of layers of the original.
        removed: The sublayers that are removed.
        earlier: The sublayers that the original skips already; they are no part of a run.

    >>> mlps_after_gaps(4, {(1, "attention"), (1, "mlp"), (3, "mlp")})
    (2,)
    """
    found, gap = list[int](), False
    for layer, kind in sublayers_left(total, earlier):
        if (layer, kind) in removed:
            gap = True
        elif gap and kind == MLP:
            found.append(layer)
            gap = False
    return tuple(found)


def look_ahead(
    total: int, removed: Collection[SublayerKey], earlier: Collection[SublayerKey] = ()
) -> dict[SublayerKey, SublayerKey]:
    """The sublayers that stay, from the one before the first run of removed sublayers on, in order.

    If a run starts the model, they begin with the first one that stays.

    Args:
        total: The number of layers of the original.
        removed: The sublayers that are removed.
        earlier: The sublayers that the original skips already; they are no part of a run.

    Returns:
        For each, the last sublayer before the next one that stays: itself, or the last of the run behind it.

    >>> look_ahead(3, {(1, "mlp"), (2, "attention")})
    {(1, 'attention'): (2, 'attention'), (2, 'mlp'): (2, 'mlp')}
    """
    row, found, last = sublayers_left(total, earlier), dict[SublayerKey, SublayerKey](), None
    first = next((place for place, sublayer in enumerate(row) if sublayer in removed), len(row) + 1)
    for sublayer in row[max(first - 1, 0) :]:
        if sublayer not in removed:
            last = sublayer
        if last is not None:
            found[last] = sublayer
    return found


def layer_count(row: Iterable[SublayerKey]) -> int:
    """The number of layers that a row of sublayers packs into."""
    return len(packed(row))


def new_zeros(row: Iterable[SublayerKey], earlier: Collection[SublayerKey] = ()) -> int:
    """The number of layers of a packed row that need new zeros, in place of the attention or the MLP they lack.

    Args:
        row: The sublayers, in the order in which they compute.
        earlier: The sublayers that the original skips already. A layer whose lacking sublayer is among them has zeros.
    """
    alone = [layer[0] for layer in packed(row) if len(layer) == 1]
    return sum((layer, MLP if kind == ATTENTION else ATTENTION) not in earlier for layer, kind in alone)
