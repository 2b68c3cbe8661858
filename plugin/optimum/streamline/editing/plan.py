"""What is to become of each layer: the outcome of a method's choice, before any weight moves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from optimum.streamline.models.architectures import Sublayer

Kind = Literal["kept", "thinned", "layer", "mlp", "ffn", "swiglu", "patched", "merged"]
ReplacementKind = Literal["none", "layer", "mlp", "ffn", "swiglu", "linear"]


# Replacements that are a layer of their own, which training makes useful.
TRAINED = ("layer", "mlp", "ffn", "swiglu")


@dataclass(frozen=True)
class PlannedLayer:
    """One layer of the new model.

    Args:
        kind: `kept` as it was, `thinned`: without its attention or its MLP, a replacement of that kind, `merged` out
            of several layers, or `patched`: kept, with the linear map that stands for the layers removed behind it
            folded in.
        originals: The original layers it stands for, one if kept.
    """

    kind: Kind
    originals: tuple[int, ...]


@dataclass(frozen=True)
class Merge:
    """Two neighbours become one layer.

    Args:
        first: Number of the first of the two in the model as the merges before this one left it.
        attention: Share of the attention's channels that the first of the two gives, the second gives the rest.
        mlp: The same of the MLP's channels.
    """

    first: int
    attention: float
    mlp: float


@dataclass(frozen=True)
class Plan:
    """Which original layers lose their place, and what stands in for them.

    Args:
        total: Layers of the original.
        gone: The layers that lose their place, rising, 0-based.
        replacement: What stands in for them: a trained layer for one contiguous block, or a linear map for each run.
        skipped: Sublayers to remove from layers that stay, as (layer, `attention` or `mlp`), rising.
        merges: Pairs to merge, in order; `gone` then names the layers that were merged into an earlier one.
        by: Which of several methods chose, where the recipe left that open.
        tried: Each method that was tried then, with its plan's loss on held-out text, nats per token; `None` where it
            could make no plan.

    Raises:
        ValueError: `gone` or `skipped` names layers that cannot be removed, a defect of the method that chose them.
    """

    total: int
    gone: tuple[int, ...]
    replacement: ReplacementKind = "none"
    skipped: tuple[tuple[int, Sublayer], ...] = ()
    merges: tuple[Merge, ...] = ()
    by: str = ""
    tried: tuple[tuple[str, float | None], ...] = ()

    def __post_init__(self) -> None:
        # Here, and not hours later where layers are moved or where JSON refuses an integer of numpy.
        if any(type(layer) is not int for layer in self.gone) or list(self.gone) != sorted({*self.gone}):
            raise ValueError(f"gone {self.gone!r}: must be a tuple of ints, rising and each once")
        if self.gone and not 0 <= self.gone[0] <= self.gone[-1] < self.total:
            raise ValueError(f"gone {self.gone!r}: must be layers of the original, 0 to {self.total - 1}")
        lost = [layer for layer, _ in self.skipped if layer in self.gone or not 0 <= layer < self.total]
        if lost:
            raise ValueError(f"skipped {self.skipped!r}: layer {lost[0]} is not one that stays")

    @property
    def net(self) -> int:
        """By how much `num_hidden_layers` falls."""
        return len(self.gone) - (self.replacement in TRAINED)

    @property
    def new_layers(self) -> tuple[PlannedLayer, ...]:
        """The new model's layers, first to last."""
        if self.merges:
            groups = merged_groups(self.total, self.merges)
            return tuple(PlannedLayer("merged" if len(group) > 1 else "kept", group) for group in groups)
        thinned = {layer for layer, _ in self.skipped}
        new_layers: list[PlannedLayer] = []
        for layer in range(self.total):
            if layer not in self.gone:
                behind = self._run_behind(layer) if self.replacement == "linear" else ()
                kind: Kind = "patched" if behind else "thinned" if layer in thinned else "kept"
                new_layers.append(PlannedLayer(kind, (layer, *behind)))
            elif self.replacement in TRAINED and layer == self.gone[0]:
                new_layers.append(PlannedLayer(self.replacement, self.gone))  # type: ignore[arg-type]
        return tuple(new_layers)

    @property
    def depths(self) -> tuple[int, ...]:
        """For each new layer, how many original layers its output stands for: h_k is what it should put out.

        The layers removed behind a layer are its own to make up for, up to the next layer that stays.
        """
        return depths_of(self.new_layers, self.total)

    def describe(self) -> str:
        """One line for a person."""
        return f"by {self.by}: {self._what()}" if self.by else self._what()

    def _what(self) -> str:
        counts = f"{self.total} layers become {len(self.new_layers)}"
        if self.merges:
            groups = [group for group in merged_groups(self.total, self.merges) if len(group) > 1]
            return f"merge layers {' and '.join(layer_ranges(group) for group in groups)}: {counts}"
        if self.replacement in TRAINED:
            return f"replace layers {layer_ranges(self.gone)} by one {self.replacement}: {counts}"
        parts = [f"remove layers {layer_ranges(self.gone)}"] if self.gone else []
        for sublayer in ("attention", "mlp"):
            layers = tuple(layer for layer, kind in self.skipped if kind == sublayer)
            if layers:
                parts.append(f"remove the {sublayer} of layers {layer_ranges(layers)}")
        patched = ", a linear map folded in before each gap" if self.replacement == "linear" else ""
        return f"{'; '.join(parts)}{patched}: {counts}"

    def _run_behind(self, layer: int) -> tuple[int, ...]:
        end = layer + 1
        while end in self.gone:
            end += 1
        return tuple(range(layer + 1, end))


def depths_of(new_layers: Sequence[PlannedLayer], total: int) -> tuple[int, ...]:
    """`Plan.depths` of layers that are these places of an original of `total` layers."""
    return (*(place.originals[0] for place in new_layers[1:]), total)


def merged_groups(total: int, merges: Sequence[Merge]) -> tuple[tuple[int, ...], ...]:
    """The original layers that each layer is made of after `merges`.

    >>> merged_groups(5, [Merge(1, 0.5, 0.5), Merge(1, 0.5, 0.5)])
    ((0,), (1, 2, 3), (4,))
    """
    groups = [(layer,) for layer in range(total)]
    for merge in merges:
        groups[merge.first] += groups.pop(merge.first + 1)  # type: ignore[assignment]
    return tuple(groups)


def merge_plan(total: int, merges: Sequence[Merge]) -> Plan:
    """The plan that makes these merges."""
    gone = sorted(layer for group in merged_groups(total, merges) for layer in group[1:])
    return Plan(total, tuple(gone), merges=tuple(merges))


def is_contiguous(layers: tuple[int, ...]) -> bool:
    """Whether rising layer numbers have no gap."""
    return layers[-1] - layers[0] == len(layers) - 1


def runs_of(layers: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """Rising layer numbers, cut where there is a gap.

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
    """Rising layer numbers for a person.

    >>> layer_ranges((1, 3, 4, 5))
    '1, 3-5'
    """
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs_of(layers))
