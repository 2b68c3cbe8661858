"""What is to become of each layer: the outcome of a method's choice, before any weight moves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["kept", "layer", "mlp"]


@dataclass(frozen=True)
class Place:
    """One layer of the new model.

    Args:
        kind: `kept` as it was, or a replacement of that kind.
        originals: The original layers it stands for, one if kept.
    """

    kind: Kind
    originals: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """Which original layers lose their place, and what stands in for them.

    Args:
        total: Layers of the original.
        gone: The layers that lose their place, rising, 0-based.
        replacement: What stands in for them, if they are one contiguous block.
    """

    total: int
    gone: tuple[int, ...]
    replacement: Literal["none", "layer", "mlp"] = "none"

    @property
    def net(self) -> int:
        """By how much `num_hidden_layers` falls."""
        return len(self.gone) - (self.replacement != "none")

    @property
    def places(self) -> tuple[Place, ...]:
        """The new model's layers, first to last."""
        places: list[Place] = []
        for layer in range(self.total):
            if layer not in self.gone:
                places.append(Place("kept", (layer,)))
            elif self.replacement != "none" and layer == self.gone[0]:
                places.append(Place(self.replacement, self.gone))
        return tuple(places)

    def describe(self) -> str:
        """One line for a person."""
        if self.replacement == "none":
            return f"remove layers {_ranges(self.gone)}: {self.total} layers become {len(self.places)}"
        return (
            f"replace layers {_ranges(self.gone)} by one trained {self.replacement}: "
            f"{self.total} layers become {len(self.places)}"
        )


def is_contiguous(layers: tuple[int, ...]) -> bool:
    """Whether rising layer numbers have no gap."""
    return layers[-1] - layers[0] == len(layers) - 1


def _ranges(layers: tuple[int, ...]) -> str:
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
