"""The interaction of pruning and quantization, from the log-losses of four models on the same windows.

ShortGPT (arXiv 2403.03853, Table 5) claims that the two are orthogonal. Here the claim becomes a number with an
interval.
"""

from __future__ import annotations

from collections.abc import Mapping

from .accuracy import Accuracy
from .intervals import Interval, mean_interval
from .results import Interaction


def interaction(
    quantizer: str, steps: str, labels: tuple[str, str, str, str], accuracies: Mapping[str, Accuracy], seed: int
) -> Interaction:
    """Compute the interaction L(both) - L(pruned) - L(quantized) + L(dense) of pruning and one quantizer.

    Args:
        quantizer: The name of the quantizer.
        steps: The order of the two, as in a recipe.
        labels: The labels of the dense, the pruned and the quantized model, and of the model that is both.
        accuracies: The accuracy of each model by label, on the same windows.
        seed: The seed of the bootstrap.
    """
    dense, pruned, quantized, both = (accuracies[label] for label in labels)

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
