"""The plan of an edit: which original layers a method removes, replaces or merges. It holds no weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from optimum.streamline.models.architectures import Sublayer
from optimum.streamline.models.removed_sublayers import SublayerKey
from optimum.streamline.models.skipped_sublayers import ATTENTION, MLP

from .packing import gaps, look_ahead, packed, sublayers_left

Kind = Literal["kept", "thinned", "layer", "mlp", "ffn", "swiglu", "patched", "merged", "packed"]
ReplacementKind = Literal["none", "layer", "mlp", "ffn", "swiglu", "linear", "corrected"]


# Replacements that are a layer of their own. They need training to be useful.
TRAINED = ("layer", "mlp", "ffn", "swiglu")
# Replacements in closed form. They are fitted on the calibration text.
FITTED = ("linear", "corrected")


@dataclass(frozen=True)
class PlannedLayer:
    """One layer of the new model.

    Args:
        kind: `kept`: unchanged. `thinned`: its attention or its MLP is skipped. `layer`, `mlp`, `ffn` or `swiglu`: a
            replacement of that kind. `patched`: kept, with a linear map folded in that stands for the layers removed
            after it. `merged`: made of several layers. `packed`: the attention of one layer and the MLP of a later one.
        originals: Numbers of the original layers that it stands for, 0-based; a kept layer stands for itself. A packed
            layer has two: the layer of its attention, and the layer of its MLP.
        corrected: Whether its attention or its MLP, or both, are corrected for what is removed (replacement
            `corrected`).
        mapped: The sublayers into which a linear map is folded for what is removed after them (replacement `linear`),
            in a plan that packs. In one that does not, the layer is `patched`, and its last sublayer holds the map.
    """

    kind: Kind
    originals: tuple[int, ...]
    corrected: bool = False
    mapped: tuple[Sublayer, ...] = ()

    @property
    def attention_originals(self) -> tuple[int, ...]:
        """The original layers that its attention stands for."""
        return self.originals[:1] if self.kind == "packed" else self.originals

    @property
    def mlp_originals(self) -> tuple[int, ...]:
        """The original layers that its MLP stands for."""
        return self.originals[1:] if self.kind == "packed" else self.originals


@dataclass(frozen=True)
class Merge:
    """The merge of two neighbouring layers into one.

    Args:
        first: Number of the first layer of the pair, counted after all earlier merges.
        attention: Share of the key-value heads that come from the first layer, 0 to 1. The rest come from the second.
        mlp: Share of the MLP neurons that come from the first layer, 0 to 1.
    """

    first: int
    attention: float
    mlp: float


@dataclass(frozen=True)
class Plan:
    """The layers that an edit removes, and what replaces them.

    Args:
        total: The number of layers of the original.
        removed: Numbers of the original layers that the new model does not have, 0-based, in rising order. A layer
            that is replaced, or merged into an earlier one, counts as removed.
        replacement: The kind of replacement: a trained layer for one contiguous block, a linear map for each run of
            removed sublayers, corrections of what is left, or none.
        skipped: Sublayers that are removed alone, as (layer, sublayer), in rising order; their layers are not in
            `removed`.
        merges: Pairs to merge, in order.
        chosen_by: For method `auto`: the candidate whose plan this is, such as "sleb + linear". Otherwise empty.
        tried: For method `auto`: every candidate with the loss of its plan on held-out text, nats per token; `None`
            where the candidate could make no plan.
        trials: For method `auto`: the rounds of trial trainings (`healing.trials`), each with the share of the training
            done and the divergence of each candidate from the original after it, in nats per token; `None` where its
            training failed.
        packs: Whether the sublayers that are left are arranged in as few layers as possible (`packing.packed`).
            Otherwise each stays in its own layer.
        already_skipped: For a plan that packs, or that has a fitted replacement: the sublayers that the original skips
            already (`skipped_of`), in rising order.

    Raises:
        ValueError: `removed` or `skipped` names layers that cannot be removed, a defect of the method that chose them.
    """

    total: int
    removed: tuple[int, ...]
    replacement: ReplacementKind = "none"
    skipped: tuple[SublayerKey, ...] = ()
    merges: tuple[Merge, ...] = ()
    chosen_by: str = ""
    tried: tuple[tuple[str, float | None], ...] = ()
    trials: tuple[tuple[float, tuple[tuple[str, float | None], ...]], ...] = ()
    packs: bool = False
    already_skipped: tuple[SublayerKey, ...] = ()

    def __post_init__(self) -> None:
        # Here, and not hours later where layers are moved or where JSON refuses an integer of numpy.
        if any(type(layer) is not int for layer in self.removed) or list(self.removed) != sorted({*self.removed}):
            raise ValueError(f"removed {self.removed!r}: must be a tuple of ints, rising and each once")
        if self.removed and not 0 <= self.removed[0] <= self.removed[-1] < self.total:
            raise ValueError(f"removed {self.removed!r}: must be layers of the original, 0 to {self.total - 1}")
        lost = [layer for layer, _ in self.skipped if layer in self.removed or not 0 <= layer < self.total]
        if lost:
            raise ValueError(f"skipped {self.skipped!r}: layer {lost[0]} is not one that stays")
        if self.packs and (self.merges or self.replacement not in ("none", *FITTED)):
            raise ValueError("packs: a plan with merges or a replacement cannot be packed")

    @property
    def new_layers(self) -> tuple[PlannedLayer, ...]:
        """The layers of the new model, in order."""
        if self.merges:
            groups = merged_groups(self.total, self.merges)
            return tuple(PlannedLayer("merged" if len(group) > 1 else "kept", group) for group in groups)
        if self.packs:
            return self._marked(_planned(layer) for layer in packed(self.sublayers_left))
        with_skips = {layer for layer, _ in self.skipped}
        with_maps = {before[0] for before in self._mapped()}
        new_layers: list[PlannedLayer] = []
        for layer in range(self.total):
            if layer not in self.removed:
                patched = layer in with_maps
                kind: Kind = "patched" if patched else "thinned" if layer in with_skips else "kept"
                after = self._removed_after(layer) if patched else ()
                new_layers.append(PlannedLayer(kind, (layer, *after)))
            elif self.replacement in TRAINED and layer == self.removed[0]:
                new_layers.append(PlannedLayer(self.replacement, self.removed))  # type: ignore[arg-type]
        return self._marked(new_layers)

    def _marked(self, layers: Iterable[PlannedLayer]) -> tuple[PlannedLayer, ...]:
        """New layers, with marks of corrections, and of linear maps if the plan packs."""
        corrected, mapped = self.corrected, self._mapped() if self.packs else ()
        marked: list[PlannedLayer] = []
        for planned in layers:
            halves = ((planned.attention_originals[0], ATTENTION), (planned.mlp_originals[0], MLP))
            maps = tuple(half[1] for half in halves if half in mapped)
            marked.append(replace(planned, corrected=any(half in corrected for half in halves), mapped=maps))
        return tuple(marked)

    def _mapped(self) -> tuple[SublayerKey, ...]:
        """For replacement `linear`: the sublayer before each gap, if there is one."""
        if self.replacement != "linear":
            return ()
        found = gaps(self.total, self.sublayers_removed, self.already_skipped)
        return tuple(before for before, _ in found if before is not None)

    @property
    def sublayers_removed(self) -> tuple[SublayerKey, ...]:
        """The sublayers of the original that the plan removes, those of removed layers included."""
        whole: list[SublayerKey] = [(layer, kind) for layer in self.removed for kind in (ATTENTION, MLP)]
        return (*whole, *self.skipped)

    @property
    def corrected(self) -> tuple[SublayerKey, ...]:
        """The sublayers that are corrected: for replacement `corrected`, all left from that before the first gap on."""
        if self.replacement != "corrected":
            return ()
        return tuple(look_ahead(self.total, self.sublayers_removed, self.already_skipped))

    @property
    def sublayers_left(self) -> tuple[SublayerKey, ...]:
        """The sublayers of the original that the plan leaves, in order."""
        return sublayers_left(self.total, (*self.sublayers_removed, *self.already_skipped))

    @property
    def depths(self) -> tuple[int, ...]:
        """For each new layer, the index k of the original hidden state h_k that its output should match.

        h_k is the original's residual stream after k layers. A layer stands for itself and for the removed layers after
        it, up to the next layer that stays. Distillation compares the two (`healing.losses.Distillation`).
        """
        return depths_of(self.new_layers, self.total)

    def describe(self) -> str:
        """The plan in one line, such as "remove layers 3-6: 16 layers become 12"."""
        return f"by {self.chosen_by}: {self._edit()}" if self.chosen_by else self._edit()

    def _edit(self) -> str:
        half = sum(planned.kind in ("thinned", "mlp") for planned in self.new_layers)
        zeros = f", {half} of them with zeros for a removed attention or MLP" if half else ""
        counts = f"{self.total} layers become {len(self.new_layers)}{zeros}"
        if self.merges:
            groups = [group for group in merged_groups(self.total, self.merges) if len(group) > 1]
            return f"merge layers {' and '.join(layer_ranges(group) for group in groups)}: {counts}"
        if self.replacement in TRAINED:
            return f"replace layers {layer_ranges(self.removed)} by one {self.replacement}: {counts}"
        edits = [f"remove layers {layer_ranges(self.removed)}"] if self.removed else []
        for sublayer in ("attention", "mlp"):
            layers = tuple(layer for layer, kind in self.skipped if kind == sublayer)
            if layers:
                edits.append(f"remove the {sublayer} of layers {layer_ranges(layers)}")
        if not edits:
            edits = ["pack what earlier edits left"]
        patched = ", a linear map folded in before each gap" if self.replacement == "linear" else ""
        if self.corrected:
            layer, sublayer = self.corrected[0]
            patched = f", corrected from the {sublayer} of layer {layer} on"
        return f"{'; '.join(edits)}{patched}: {counts}"

    def _removed_after(self, layer: int) -> tuple[int, ...]:
        end = layer + 1
        while end in self.removed:
            end += 1
        return tuple(range(layer + 1, end))


def _planned(sublayers: Sequence[SublayerKey]) -> PlannedLayer:
    """The layer that holds these one or two sublayers."""
    layers = tuple(layer for layer, _ in sublayers)
    if len(layers) == 1:
        return PlannedLayer("thinned", layers)
    return PlannedLayer("kept", layers[:1]) if layers[0] == layers[1] else PlannedLayer("packed", layers)


def depths_of(new_layers: Sequence[PlannedLayer], total: int) -> tuple[int, ...]:
    """`Plan.depths` for these layers of an original with `total` layers."""
    return (*(planned.originals[0] for planned in new_layers[1:]), total)


def merged_groups(total: int, merges: Sequence[Merge]) -> tuple[tuple[int, ...], ...]:
    """For each layer after `merges`, the original layers that it is made of.

    >>> merged_groups(5, [Merge(1, 0.5, 0.5), Merge(1, 0.5, 0.5)])
    ((0,), (1, 2, 3), (4,))
    """
    groups = [(layer,) for layer in range(total)]
    for merge in merges:
        groups[merge.first] += groups.pop(merge.first + 1)  # type: ignore[assignment]
    return tuple(groups)


def merge_plan(total: int, merges: Sequence[Merge]) -> Plan:
    """The plan of these merges, for an original with `total` layers."""
    removed = sorted(layer for group in merged_groups(total, merges) for layer in group[1:])
    return Plan(total, tuple(removed), merges=tuple(merges))


def packed_plan(
    total: int,
    removed: Iterable[SublayerKey],
    already_skipped: Iterable[SublayerKey] = (),
    replacement: ReplacementKind = "none",
) -> Plan:
    """The plan that removes sublayers and packs the others.

    Args:
        total: The number of layers of the original.
        removed: The sublayers to remove.
        already_skipped: The sublayers that the original skips already.
        replacement: `none`, `linear` or `corrected`.
    """
    before = frozenset(already_skipped)
    gone = before.union(removed)
    layers = tuple(layer for layer in range(total) if {(layer, "attention"), (layer, "mlp")} <= gone)
    skipped = sorted(sublayer for sublayer in gone - before if sublayer[0] not in layers)
    return Plan(total, layers, replacement, tuple(skipped), packs=True, already_skipped=tuple(sorted(before)))


def is_contiguous(layers: tuple[int, ...]) -> bool:
    """Whether layer numbers in rising order have no gap."""
    return layers[-1] - layers[0] == len(layers) - 1


def runs_of(layers: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """Split layer numbers in rising order into runs without a gap.

    >>> runs_of((1, 2, 5))
    ((1, 2), (5,))
    """
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return tuple(tuple(run) for run in runs)


def layer_ranges(layers: tuple[int, ...]) -> str:
    """Layer numbers in rising order as text, with a range for each run.

    >>> layer_ranges((1, 3, 4, 5))
    '1, 3-5'
    """
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs_of(layers))
