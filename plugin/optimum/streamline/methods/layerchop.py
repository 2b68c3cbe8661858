"""Method `layerchop` (LayerChop, "Just CHOP", arXiv 2305.14864): remove layers by position alone."""

from __future__ import annotations

from collections.abc import Callable

from transformers import PreTrainedConfig

from optimum.streamline.editing.plan import Plan
from optimum.streamline.errors import StreamlineError
from optimum.streamline.recipe.recipe import Recipe

from .base import Method, MethodInputs


def _max_gap(total: int, kept: int) -> list[int]:
    # i (total - 1) / (kept - 1), rounded half up. Integer arithmetic gives the same result on every machine.
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
    """Keep k of L layers by position, always with the first and the last. No score counts.

    `pattern` names the place where layers are removed:

    - `max-gap` (default): the kept layers are evenly spread, at round(i (L - 1) / (k - 1)) for i = 0 .. k - 1.
    - `input`: keep the first layer and the last k - 1.
    - `output`: keep the first k - 1 layers and the last.
    - `middle`: keep the first ceil(k / 2) layers and the last floor(k / 2).
    - `both`: keep the first layer, the last, and k - 2 in the centre (one layer more is removed after them if L - k is
      odd).

    The default healing is `heal: lm` for the whole model, with the paper's peak learning rate of 3e-4 for LLaMA2 and
    its cosine schedule down to a tenth of the peak.

    Source: Just CHOP (arXiv 2305.14864), Figure 5.

    Deviations:

    - The paper shows the patterns only as pictures, with half of the layers removed. The indices above are
      reconstructed from them, and extended to any L and k.
    - The paper trains for 500 steps before it removes layers, to fill the state of the optimizer. Here healing starts
      after the removal, with a warmup of its own.
    - The warmup takes 5% of the updates, not 2000 steps.
    - The paper's distillation adds to the cross-entropy the KL divergence of the logits, and squared errors of hidden
      states (through a learned projection), attention and embeddings. `heal: distill` here is the same for all methods:
      it has neither the projection nor the errors of attention and embeddings, and its own schedule
      (`healing.settings.model_settings`).
    """

    by_scores = True
    options = ("pattern",)

    def check(self, recipe: Recipe, config: PreTrainedConfig) -> None:
        """Refuse a recipe as the base class does, and the removal of the first or the last layer."""
        super().check(recipe, config)
        total = config.num_hidden_layers
        if self.count(recipe, total) > total - 2:
            raise StreamlineError(
                f"remove {recipe.pruning.remove!r}: method layerchop keeps the first and the last of {total} layers; "
                f"remove at most {total - 2}"
            )

    def plan(self, recipe: Recipe, inputs: MethodInputs) -> Plan:
        """Remove all layers that the pattern does not keep."""
        total = inputs.layers
        kept = PATTERNS[recipe.pruning.pattern or "max-gap"](total, total - self.count(recipe, total))
        return Plan(total, tuple(layer for layer in range(total) if layer not in kept), recipe.resolved_replacement)
