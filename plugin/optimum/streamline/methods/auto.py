"""The default: the choice that `docs/methods.md` measured to be best, under a name that may come to mean another."""

from __future__ import annotations

from .blockpruner import BlockPruner


class Auto(BlockPruner):
    """BlockPruner's choice of attentions and MLPs; `heal`, left out, is `distill` to the original's logits.

    Of all methods measured on three trained models it costs least perplexity at every share of the weights removed,
    before healing and after it (`docs/methods.md`, `ci/bench methods`).
    """

    summary = "the default: what docs/methods.md measures to be best; today blockpruner, then heal distill"
