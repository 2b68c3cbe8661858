"""The default: the choice that `docs/methods.md` measured to be best, under a name that may come to mean another."""

from __future__ import annotations

from .blockpruner import BlockPruner


class Auto(BlockPruner):
    """BlockPruner's choice of attentions and MLPs; `heal`, left out, is `distill`: the original's logits and states.

    On the reference model it costs least perplexity of all methods, unhealed at every share removed and distilled at a
    quarter and a half, at a quarter with others in its interval (`docs/methods.md`, `ci/bench methods`).
    """

    summary = "the default: what docs/methods.md measures to be best; today blockpruner, then heal distill"
