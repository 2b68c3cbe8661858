"""Method `shifted`: remove pairs of a neighbouring attention and MLP, of one layer or of two, one by one, by loss."""

from __future__ import annotations

import math
from collections.abc import Collection
from itertools import pairwise

from transformers import PreTrainedConfig

from optimum.streamline.editing.packing import layer_count, new_zeros, sublayers_left
from optimum.streamline.editing.plan import Plan, packed_plan
from optimum.streamline.errors import StreamlineError
from optimum.streamline.models.architectures import can_pack
from optimum.streamline.models.removed_sublayers import SublayerKey, SublayerSet, fully_removed_layers
from optimum.streamline.models.skipped_sublayers import ATTENTION, skipped_of
from optimum.streamline.recipe.recipe import Recipe
from optimum.streamline.scoring.ablation import corrected_losses, cross_fitted_losses, removal_losses
from optimum.streamline.scoring.race import race_removals
from optimum.streamline.text.windows import Windows

from .base import MethodInputs, corrects
from .protected_ends import ProtectedEndsMethod

SWAP_TOKENS = 24_576
"""The number of held-out tokens that is enough to judge swaps on."""


class Shifted(ProtectedEndsMethod):
    """At each step, remove the pair p whose removal gives the lowest calibration loss, argmin_p CE(model - R - p).

    R is the set of pairs removed in earlier steps. A pair is an attention and an MLP that are neighbours in what is
    left: those of one layer, or the MLP of a layer and the attention of the next. Either leaves attentions and MLPs
    in turn, which make whole layers again (`editing.packing`): each pair costs the model exactly one layer. The
    choices include those of SLEB (arXiv 2402.09025), whole layers. The losses of a step are compared in a race
    (`scoring.race`), which may choose another of nearly equal losses. Among equal losses the first pair wins. In a
    model that skips sublayers already, a sublayer without which there is a layer less is removed alone.

    Then pairs are swapped: a removed pair comes back and another one goes, as long as that lowers the calibration loss
    and the loss on held-out text. Trying each removed pair once takes about as long as the greedy search.

    With replacement `corrected`, CE is the loss after a correction of the first MLP after each gap, which is cheap
    (`editing.candidate_corrections.fit_candidates`), on each half of the text with those fitted on the other half. The
    losses that decide whether to swap are those after all corrections (`editing.correction.fit_corrections`), which the
    plan gets in the end.

    Models that cannot be packed (`can_pack`) lose whole layers only.

    This method is the program's own. The greedy search over layers is SLEB's.
    """

    default_protect = "0,0"

    def may_pack(self, recipe: Recipe, config: PreTrainedConfig) -> bool:
        """Whether the model can be packed."""
        return can_pack(config)

    def held_out(self, recipe: Recipe) -> int:
        """As many windows as for calibration, but at most as many as hold `SWAP_TOKENS` tokens, to judge swaps on."""
        return min(recipe.calibration.samples, math.ceil(SWAP_TOKENS / recipe.length))

    def plan(self, recipe: Recipe, inputs: MethodInputs) -> Plan:
        """Remove pairs greedily until the model has `remove` fewer layers, then swap.

        Raises:
            StreamlineError: no further pair can go, because of protected layers or the last attention.
        """
        config, allowed = inputs.model.config, self.removable(recipe, inputs.layers)
        earlier = skipped_of(config)
        pairs: list[SublayerSet] = []
        target = inputs.layers - self.count(recipe, inputs.layers)
        while (left := _layers(config, earlier.union(*pairs))) > target:
            if not pairs_of(config, earlier.union(*pairs), allowed):
                raise StreamlineError(
                    f"remove {recipe.pruning.remove!r}: at most {inputs.layers - left} of {inputs.layers} layers can "
                    f"go, because one attention and what protect {self.protect(recipe)!r} names must stay; remove fewer"
                )
            pairs.append(_best_pair(recipe, inputs, earlier.union(*pairs), allowed))
        if inputs.held_out is not None and pairs:
            pairs = _swapped(recipe, inputs, inputs.held_out, pairs, allowed)
        removed = earlier.union(*pairs)
        if not can_pack(config):
            return Plan(inputs.layers, fully_removed_layers(removed), recipe.resolved_replacement)
        return packed_plan(inputs.layers, removed, earlier, recipe.resolved_replacement)


def pairs_of(config: PreTrainedConfig, removed: SublayerSet, allowed: range) -> list[SublayerSet]:
    """What may be removed next: pairs of neighbouring sublayers, and sublayers without which there is a layer less.

    Args:
        config: The model's config.
        removed: The sublayers that are removed already.
        allowed: The layers that may lose sublayers.

    Returns:
        The sublayers to remove together, first to last. Each leaves one layer less and no new zeros. None takes the
        last attention.
    """
    row = sublayers_left(config.num_hidden_layers, removed)
    if can_pack(config):
        alone = [(sublayer,) for sublayer in row if _costs_one_layer(config, removed, {sublayer})]
        beside = [
            pair for pair in pairwise(row) if pair[0][1] != pair[1][1] and not {(each,) for each in pair} & {*alone}
        ]
        candidates = sorted([*alone, *beside])
    else:  # what is left of each layer
        candidates = [tuple(sublayer for sublayer in row if sublayer[0] == layer) for layer in dict(row)]
    attentions = {sublayer for sublayer in row if sublayer[1] == ATTENTION}
    return [
        frozenset(some)
        for some in candidates
        if all(layer in allowed for layer, _ in some)
        and _costs_one_layer(config, removed, some)
        and not attentions <= {*some}
    ]


def _costs_one_layer(config: PreTrainedConfig, removed: SublayerSet, some: Collection[SublayerKey]) -> bool:
    """Whether a model without `removed` has exactly one layer more than without `some` too, and no new zeros then."""
    without = removed.union(some)
    if can_pack(config) and new_zeros(sublayers_left(config.num_hidden_layers, without), skipped_of(config)):
        return False
    return _layers(config, without) == _layers(config, removed) - 1


def _layers(config: PreTrainedConfig, removed: SublayerSet) -> int:
    """The number of layers of the model without `removed`."""
    total: int = config.num_hidden_layers
    return (
        layer_count(sublayers_left(total, removed)) if can_pack(config) else total - len(fully_removed_layers(removed))
    )


def _best_pair(recipe: Recipe, inputs: MethodInputs, removed: SublayerSet, allowed: range) -> SublayerSet:
    """The pair of lowest loss."""
    pairs = pairs_of(inputs.model.config, removed, allowed)
    return pairs[race_removals(inputs.model, inputs.calibration, pairs, removed, corrects(recipe)).best]


def _swapped(
    recipe: Recipe, inputs: MethodInputs, held_out: Windows, pairs: list[SublayerSet], allowed: range
) -> list[SublayerSet]:
    """Swap removed pairs for others, each time the swap that lowers the calibration loss most.

    Returns:
        The pairs after the last swap that also lowered the loss on `held_out`.
    """
    model, earlier = inputs.model, skipped_of(inputs.model.config)
    while True:
        tried = {earlier.union(*pairs): pairs}
        for pair in pairs:
            others = [each for each in pairs if each != pair]
            if _costs_one_layer(model.config, earlier.union(*others), pair):  # others may need what it left
                swap = [*others, _best_pair(recipe, inputs, earlier.union(*others), allowed)]
                tried.setdefault(earlier.union(*swap), swap)
        removals = list(tried)
        score = cross_fitted_losses if corrects(recipe) else removal_losses
        losses = score(model, inputs.calibration, removals)
        now, best = earlier.union(*pairs), removals[losses.index(min(losses))]
        if corrects(recipe):
            before, after = corrected_losses(model, held_out, [now, best], inputs.calibration)
        else:
            before, after = removal_losses(model, held_out, [now, best])
        if after >= before:
            return pairs
        pairs = tried[best]
