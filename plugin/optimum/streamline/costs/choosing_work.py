"""How often a method runs the layers and the head of a model: to score the layers, make its plan and follow it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from transformers import PreTrainedConfig

from optimum.streamline.methods.auto import Auto, makes_trials, recipe_of
from optimum.streamline.methods.base import corrects
from optimum.streamline.methods.come_p import GRID
from optimum.streamline.methods.registry import METHODS
from optimum.streamline.recipe.quantities import parse_remove
from optimum.streamline.recipe.recipe import Recipe
from optimum.streamline.scoring.race import MIN_WINDOWS

RACE = 0.36
"""The share of the windows that the removals of a race are tried on (measured: `docs/search.md`)."""
SWAP_ROUNDS, SWAP_ROUNDS_CORRECTED = 2, 1.5
"""How many times `shifted` tries to swap each pair: once for each swap that it finds, and once to find no further one.
With corrections fewer swaps lower the held-out loss."""
REMOVALS = {"blockpruner": 2, "shifted": 2, "sleb": 1}
"""How many removals a greedy search compares for each layer, at a step."""
FITS = {"linear": 2, "corrected": 4}
"""How many forward passes it takes to fit a replacement, about."""
CORRECTED = 2.4
"""How much longer a search takes that compares removals with their corrections."""
BACKWARD = 3
"""What a forward and a backward pass cost, in forward passes."""


@dataclass(frozen=True)
class ChoosingWork:
    """The work of choosing, in windows of text.

    Args:
        layers: The number of windows that run through a layer, summed over the layers.
        heads: The number of windows that run through the output head.
    """

    layers: float = 0.0
    heads: float = 0.0

    def __add__(self, other: ChoosingWork) -> ChoosingWork:
        return ChoosingWork(self.layers + other.layers, self.heads + other.heads)

    def times(self, factor: float) -> ChoosingWork:
        """This work several times."""
        return ChoosingWork(self.layers * factor, self.heads * factor)


def choosing_work(recipe: Recipe, config: PreTrainedConfig) -> ChoosingWork | None:
    """The work of scoring the layers of a model and of choosing a plan, about.

    Races and swaps depend on the text, so a search may take half as much more or less.

    Args:
        recipe: The recipe.
        config: The original's config.

    Returns:
        The work; `None` for a method of another package, of which nothing is known.
    """
    if recipe.resolved_method == "explicit":
        return _fitting(recipe, config)
    scoring = _fitting(recipe, config) + _passes(config.num_hidden_layers, recipe.calibration.samples)
    if recipe.resolved_method != "auto":
        planning = _planning(recipe, config)
        return planning and scoring + planning
    total, compared = scoring, Auto().held_out(recipe)
    for candidate in compared_recipes(recipe, config):
        planning = _planning(candidate, config)
        assert planning is not None, candidate.resolved_method
        total += planning + _fitting(candidate, config) + _passes(config.num_hidden_layers, compared, heads=True)
    return total


def compared_recipes(recipe: Recipe, config: PreTrainedConfig) -> list[Recipe]:
    """The recipes whose plans are made: those of the candidates of `auto`, else the recipe itself."""
    if recipe.resolved_method != "auto":
        return [recipe]
    return [recipe_of(recipe, name) for name in Auto().candidates(recipe, config, makes_trials(recipe))]


def _fitting(recipe: Recipe, config: PreTrainedConfig) -> ChoosingWork:
    """The work of fitting the replacement of a plan."""
    return _passes(config.num_hidden_layers, FITS.get(recipe.resolved_replacement, 0) * recipe.calibration.samples)


def _passes(layers: float, windows: float, heads: bool = False) -> ChoosingWork:
    """One pass of some windows through some layers, with the head or without."""
    return ChoosingWork(layers * windows, windows * heads)


@dataclass(frozen=True)
class _Search:
    """What the work of a method depends on."""

    recipe: Recipe
    config: PreTrainedConfig

    @property
    def layers(self) -> int:
        """The number of the model's layers."""
        layers: int = self.config.num_hidden_layers
        return layers

    @property
    def windows(self) -> int:
        """The number of calibration windows."""
        return self.recipe.calibration.samples

    @property
    def count(self) -> int:
        """The number of steps: of layers that the model loses."""
        remove = self.recipe.pruning.remove
        return 0 if remove is None else parse_remove(remove, self.layers)

    @property
    def left(self) -> range:
        """The number of layers before each step."""
        return range(self.layers, self.layers - self.count, -1)

    def race(self, layers: int, candidates: int) -> ChoosingWork:
        """A race of removals (`scoring.race`), or of removals with their corrections."""
        share = max(RACE, min(1.0, MIN_WINDOWS / self.windows))
        return self.compared(layers, candidates * share)

    def compared(self, layers: int, candidates: float) -> ChoosingWork:
        """Removals that are all tried on all windows, with their corrections if the search compares these."""
        return self.tried(layers, candidates).times(CORRECTED if corrects(self.recipe) else 1)

    def tried(self, layers: int, candidates: float) -> ChoosingWork:
        """Removals that are all tried on all windows. On average a removal runs half of the layers, after its own."""
        return _passes(layers * (1 + candidates / 2), self.windows) + ChoosingWork(0, candidates * self.windows)

    def races(self) -> list[ChoosingWork]:
        """One race a step."""
        return [self.race(number, REMOVALS[self.recipe.resolved_method] * number) for number in self.left]

    def passes(self, number: int = 1) -> list[ChoosingWork]:
        """So many passes a step."""
        return [_passes(layers, number * self.windows) for layers in self.left]


def _planning(recipe: Recipe, config: PreTrainedConfig) -> ChoosingWork | None:
    """The work of one method after the scoring."""
    if recipe.resolved_method not in _STEPS:
        return None
    return sum(_STEPS[recipe.resolved_method](_Search(recipe, config)), ChoosingWork())


def _nothing(search: _Search) -> list[ChoosingWork]:
    return []


def _shortgpt(search: _Search) -> list[ChoosingWork]:
    return search.passes()[1:] if search.recipe.pruning.iterative else []


def _shifted(search: _Search) -> list[ChoosingWork]:
    left, count = search.layers - search.count, search.count
    tried = search.race(left + 1, 2 * (left + 1)).times(count)
    if corrects(search.recipe):  # all swaps get all corrections, and again the two that held-out text decides between
        judged = ChoosingWork(left * (FITS["corrected"] + 1), 1).times((count + 3) * search.windows)
        return [*search.races(), (tried + judged).times(SWAP_ROUNDS_CORRECTED)]
    return [*search.races(), (tried + search.tried(left, count + 1)).times(SWAP_ROUNDS)]


def _blockpruner(search: _Search) -> list[ChoosingWork]:
    if METHODS["blockpruner"].may_pack(search.recipe, search.config):  # every second step completes a pair
        return search.races() + [search.compared(number, 2) for number in search.left]
    return search.races() * 2


def _taylor(search: _Search) -> list[ChoosingWork]:
    # Each layer runs forward, and again for its gradient.
    return [_passes(search.layers, search.windows * (1 + BACKWARD)), ChoosingWork(0, search.windows * BACKWARD)]


def _come(search: _Search) -> list[ChoosingWork]:
    return search.passes(2)  # channels are measured for the plan, and again for each merge


def _come_p(search: _Search) -> list[ChoosingWork]:
    return _come(search) + [search.tried(number, GRID + 1) for number in search.left]


_STEPS: dict[str, Callable[[_Search], list[ChoosingWork]]] = {
    "average": _Search.passes,
    "blockpruner": _blockpruner,
    "come": _come,
    "come-mp": _come,
    "come-p": _come_p,
    "come-sp": _come,
    "gromov": _nothing,
    "layerchop": _nothing,
    "llm-streamline": _nothing,
    "shifted": _shifted,
    "shortened-ppl": lambda search: [search.tried(search.layers, search.layers)],
    "shortened-taylor": _taylor,
    "shortgpt": _shortgpt,
    "sleb": _Search.races,
}
"""The work of each of our methods; `auto` does that of its candidates."""
