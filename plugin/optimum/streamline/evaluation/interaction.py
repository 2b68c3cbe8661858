"""How removing layers and quantizing meet: log-losses of four models on the same windows, and what to say of them.

ShortGPT (arXiv 2403.03853, table 5) claims that the two are orthogonal. Here that is a number with an interval. Knows
neither models nor how they were made.
"""

from __future__ import annotations

from collections.abc import Mapping

from .accuracy import Accuracy
from .intervals import Interval, mean_interval
from .results import Interaction


def interaction(
    quantizer: str, steps: str, labels: tuple[str, str, str, str], found: Mapping[str, Accuracy], seed: int
) -> Interaction:
    """The interaction of one quantizer with the removal of layers.

    Args:
        labels: Of the dense, the pruned, the quantized model and the one that had both.
        found: What was measured of each label, on the same windows.
        seed: Of the bootstrap.
    """
    dense, pruned, quantized, both = (found[label] for label in labels)

    def mean(loss: object) -> Interval:
        return mean_interval(loss, dense.tokens, seed, dense.documents)  # type: ignore[arg-type]

    return Interaction(
        quantizer,
        steps,
        *labels,
        pruning=mean(pruned.loss - dense.loss),
        quantizing=mean(quantized.loss - dense.loss),
        together=mean(both.loss - dense.loss),
        term=mean(both.loss - pruned.loss - quantized.loss + dense.loss),
    )
