"""Alternate dropping (Sajjad et al., arXiv 2004.03844): remove every other layer, from the top."""

from __future__ import annotations

from transformers import PreTrainedConfig

from optimum.streamline.methods.base import Method, MethodInputs, Plan, Recipe, StreamlineError


class EveryOther(Method):
    """Removes the last layer but one, and every other layer below it, until `remove` layers are removed.

    The last layer and layer 0 stay: the paper's odd-alternate dropping, which keeps the last layer. No score decides.
    """

    summary = "every other layer from the top, the first and the last stay (2004.03844)"
    by_scores = True

    def check(self, recipe: Recipe, config: PreTrainedConfig) -> None:
        """Refuse also to remove more than every other layer."""
        super().check(recipe, config)
        total = config.num_hidden_layers
        count, most = self.count(recipe, total), len(removable(total))
        if count > most:
            raise StreamlineError(
                f"remove {recipe.pruning.remove!r}: every other of {total} layers is at most {most}, and {count} are "
                f"to go; remove {most} or fewer, or use another method"
            )

    def plan(self, recipe: Recipe, inputs: MethodInputs) -> Plan:
        """The first `remove` of the layers that may go, from the top."""
        chosen = removable(inputs.layers)[: self.count(recipe, inputs.layers)]
        return Plan(inputs.layers, tuple(sorted(chosen)), recipe.resolved_replacement)


def removable(total: int) -> range:
    """Every other layer below the last of `total`, from the top, without layer 0.

    >>> list(removable(8))
    [6, 4, 2]
    """
    return range(total - 2, 0, -2)
