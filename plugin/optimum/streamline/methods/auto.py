"""The default: the choice that `docs/methods.md` measured to be best, under a name that may come to mean another."""

from __future__ import annotations

from .blockpruner import BlockPruner


class Auto(BlockPruner):
    """BlockPruner's choice of attentions and MLPs; `heal`, left out, is `distill`: the original's logits and states.

    Unhealed, it costs least perplexity of all methods at every share removed from the reference model; distilled, as
    much as CoMe at a quarter and less at a half, the others not yet measured (`docs/methods.md`, `ci/bench methods`).
    """

    summary = "the default: what docs/methods.md measures to be best; today blockpruner, then heal distill"
