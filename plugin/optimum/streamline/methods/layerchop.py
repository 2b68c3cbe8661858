"""LayerChop (Just CHOP, arXiv 2305.14864): remove layers by their place alone, all at once."""

from __future__ import annotations

from collections.abc import Callable

from transformers import PreTrainedConfig

from optimum.streamline.editing.plan import Plan
from optimum.streamline.errors import StreamlineError
from optimum.streamline.recipe.recipe import Recipe

from .base import Method, MethodInputs


def _max_gap(total: int, kept: int) -> list[int]:
    # i (total - 1) / (kept - 1), to the nearest whole number, halves up: in integers, so the same everywhere.
    steps = kept - 1
    return [(2 * i * (total - 1) + steps) // (2 * steps) for i in range(kept)]


def _input(total: int, kept: int) -> list[int]:
    return [0, *range(total - kept + 1, total)]


def _output(total: int, kept: int) -> list[int]:
    return [*range(kept - 1), total - 1]


def _middle(total: int, kept: int) -> list[int]:
    last = kept // 2
    return [*range(kept - last), *range(total - last, total)]


def _both(total: int, kept: int) -> list[int]:
    start = (total - kept + 2) // 2
    return [0, *range(start, start + kept - 2), total - 1]


PATTERNS: dict[str, Callable[[int, int], list[int]]] = {
    "max-gap": _max_gap,
    "input": _input,
    "output": _output,
    "middle": _middle,
    "both": _both,
}


class LayerChop(Method):
    """Keep k >= 2 of L layers, the first and the last always among them, whatever the layers compute.

    `pattern` says which, and is named after where layers are taken out:

    - `max-gap` (default): evenly spread, layer round(i (L - 1) / (k - 1)) for i = 0 .. k - 1, halves up
    - `input`: the first layer and the last k - 1 stay
    - `output`: the first k - 1 and the last
    - `middle`: the first ceil(k / 2) and the last floor(k / 2)
    - `both`: the first, the last, and k - 2 in the centre, the later ones where they cannot be centred

    The paper shows its configurations as pictures only, of half of the layers removed; these indices are
    reconstructed from those figures and carried over to any L and k. It trains the whole model on afterwards with
    its pretraining objective, which is the default healing (`heal: lm`) of this method, at the 3e-4 it has for LLaMA2
    and along its cosine to a tenth of that. Scores are not used.

    Deviations in healing: the paper trains 500 steps before it removes layers, to fill the optimizer's state, which
    this program, whose healing warms up anew, does not; its warmup of 2000 steps, of billions of tokens, is 5% of the
    updates here. The paper's distillation, which it finds worse for the time it takes, adds to cross-entropy the KL to
    the original's logits and the squared errors of hidden states, by a learned projection, of attention and of
    embeddings; `distill` is this program's for all methods: without the last two and the projection, and with a
    schedule of its own (`healing.settings.model_settings`).
    """

    by_scores = True
    options = ("pattern",)

    def check(self, recipe: Recipe, config: PreTrainedConfig) -> None:
        """Refuse what the base class refuses, and to remove the first or the last layer."""
        super().check(recipe, config)
        total = config.num_hidden_layers
        if self.count(recipe, total) > total - 2:
            raise StreamlineError(
                f"remove {recipe.pruning.remove!r}: method layerchop keeps the first and the last of {total} layers; "
                f"at most {total - 2} can go"
            )

    def plan(self, recipe: Recipe, inputs: MethodInputs) -> Plan:
        """All layers but those the pattern keeps."""
        total = inputs.layers
        kept = PATTERNS[recipe.pruning.pattern or "max-gap"](total, total - self.count(recipe, total))
        return Plan(total, tuple(layer for layer in range(total) if layer not in kept), recipe.resolved_replacement)
