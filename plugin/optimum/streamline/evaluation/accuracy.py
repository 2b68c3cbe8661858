"""What each model makes of the same tokens: log-loss, KL(original || candidate), top-1 agreement, window by window.

The original's logits of a window are computed once, and every model is judged on that window before the next:
memory does not grow with the number of windows. This file knows runners, not what runs behind them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from optimum.streamline.errors import StreamlineError
from optimum.streamline.runtime.runner import Logits, Runner, TokenIds
from optimum.streamline.system.progress import progress_bar
from optimum.streamline.text.windows import Windows

from .intervals import Interval, Samples, mean_interval

# Logits are compared in float64, at most this many at a time.
CHUNK_LOGITS = 1 << 22


@dataclass(frozen=True, eq=False)
class Accuracy:
    """Sums over the predicted tokens of each window, every array `[windows]`.

    Args:
        loss: Next-token log-loss, nats.
        kl: KL(original || this model), nats.
        agreement: Tokens for which both models' likeliest next token is the same.
        tokens: Predicted tokens: a window of n tokens has n - 1.
        documents: Of each window the document that it is from; empty where that is not known.
    """

    loss: Samples
    kl: Samples
    agreement: Samples
    tokens: Samples
    documents: tuple[int, ...] = ()

    def perplexity(self, seed: int) -> Interval:
        """exp of the mean log-loss over all tokens."""
        return mean_interval(self.loss, self.tokens, seed, self.documents).map(np.exp)

    def perplexity_ratio(self, original: Accuracy, seed: int) -> Interval:
        """This perplexity over the original's, paired: windows or documents are drawn, each with both its losses."""
        return mean_interval(self.loss - original.loss, self.tokens, seed, self.documents).map(np.exp)

    def mean_kl(self, seed: int) -> Interval:
        """Mean KL(original || this model), nats per token."""
        return mean_interval(self.kl, self.tokens, seed, self.documents)

    def mean_agreement(self, seed: int) -> Interval:
        """Share of tokens, 0 to 1, on which the likeliest next token is the original's."""
        return mean_interval(self.agreement, self.tokens, seed, self.documents)


def measure_accuracy(runners: Sequence[Runner], labels: Sequence[str], windows: Windows) -> list[Accuracy]:
    """Judge every runner against the first, the first itself included, on the same tokens.

    Args:
        labels: What messages call the runners.

    Returns:
        One `Accuracy` a runner. A candidate's logits that are not finite make its sums so: NaN or infinite.

    Raises:
        StreamlineError: vocabularies differ, a token is outside of them, or the first runner's logits are not finite.
    """
    _check_vocabularies(runners, labels, int(windows.ids.max()))
    sums = np.zeros((len(runners), 3, len(windows.ids)))
    with progress_bar("measuring accuracy", len(windows.ids)) as bar:
        for index, window in enumerate(windows.ids):
            ids: TokenIds = window[None].numpy()
            reference, _ = runners[0].prefill(ids)
            for number, runner in enumerate(runners):
                logits = runner.prefill(ids)[0] if number else reference
                sums[number, :, index] = compare(reference[0], logits[0], ids[0])
            if not np.isfinite(sums[0, :, index]).all():
                raise StreamlineError(
                    f"{labels[0]}: its logits are not finite, nothing can be compared; try dtype 'fp32'"
                )
            bar.advance()
    tokens = np.full(len(windows.ids), windows.ids.shape[1] - 1, np.float64)
    return [Accuracy(loss, kl, agreement, tokens, windows.documents) for loss, kl, agreement in sums]


def compare(original: Logits, candidate: Logits, ids: TokenIds) -> tuple[float, float, float]:
    """Sums over one window: the candidate's log-loss and KL(original || candidate) in nats, and tokens agreed on.

    Args:
        original: Logits `[length, vocabulary]`.
        candidate: Logits `[length, vocabulary]`.
        ids: Tokens `[length]`; the logits of the last predict none of them, and are left out.
    """
    rows = max(1, CHUNK_LOGITS // original.shape[-1])
    # Loss of the next token, KL, agreement; what is NaN in any token stays NaN in the sum.
    total = torch.zeros(3, dtype=torch.float64)
    for start in range(0, len(ids) - 1, rows):
        chunk = slice(start, min(start + rows, len(ids) - 1))
        p = torch.from_numpy(original[chunk]).double().log_softmax(-1)
        q = torch.from_numpy(candidate[chunk]).double().log_softmax(-1)
        following = torch.from_numpy(ids[start + 1 : chunk.stop + 1])
        loss = -q.gather(-1, following[:, None])
        # A token that the original rules out adds nothing, whatever the candidate says of it: not 0 x infinity.
        kl = torch.where(p == -torch.inf, 0.0, p.exp() * (p - q))
        # Where NaN is the largest, there is no likeliest token to agree on.
        agreed = (p.argmax(-1) == q.argmax(-1)) & ~q.isnan().any(-1)
        total += torch.stack([loss.sum(), kl.sum(), agreed.sum().double()])
    return total[0].item(), total[1].item(), total[2].item()


def _check_vocabularies(runners: Sequence[Runner], labels: Sequence[str], largest: int) -> None:
    probe = np.zeros((1, 1), np.int64)
    sizes = [runner.prefill(probe)[0].shape[-1] for runner in runners]
    for label, size in zip(labels, sizes, strict=True):
        if size != sizes[0]:
            raise StreamlineError(
                f"{label}: a vocabulary of {size} tokens, {labels[0]} has {sizes[0]}: they cannot be compared"
            )
    if largest >= sizes[0]:
        raise StreamlineError(f"eval-data: token {largest} is outside {labels[0]}'s vocabulary of {sizes[0]}")
