"""A race of removals: the one of lowest loss, found without computing every loss on every window.

A greedy search tries many removals, and most are far from the best after a few windows. A removal leaves the race when
its paired difference from the leader, on the windows so far, is larger than chance explains. Now and then that drops
the removal which would have been best on all windows, by a little (measured: `docs/search.md`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from optimum.streamline.editing.candidate_corrections import fit_candidates
from optimum.streamline.models.removed_sublayers import SublayerSet
from optimum.streamline.system.progress import progress_bar
from optimum.streamline.text.windows import BATCH, Windows

from .ablation import removal_window_losses
from .loss import mean_losses

PRIOR_WINDOWS = 4
"""The weight, in windows, of the median variance over the removals in the estimate of each removal's own variance.

A variance estimated on few windows is often far too small, and then drops the best removal.
"""
MIN_WINDOWS = 4
"""The number of windows that every removal is tried on."""
DEVIATIONS = 2.5
"""How many standard errors a removal must lie behind the leader to leave the race (measured: `docs/search.md`)."""


@dataclass(frozen=True)
class RaceResult:
    """The result of a race.

    Args:
        best: The index of the removal of lowest loss.
        tried: The number of windows on which removals were tried, summed over the removals.
    """

    best: int
    tried: int


def race_removals(
    model: PreTrainedModel,
    windows: Windows,
    candidates: Sequence[SublayerSet],
    removed: SublayerSet = frozenset(),
    correcting: bool = False,
) -> RaceResult:
    """Find the removal of lowest loss, mean next-token cross-entropy on `windows`.

    Args:
        model: The model, in evaluation mode; it is unchanged afterwards.
        windows: The text to compute the loss on.
        candidates: The sublayers to remove, one set for each removal; none is empty.
        removed: Sublayers to remove in addition, for every candidate.
        correcting: Whether the loss of a removal is that after a correction of the first MLP after each gap
            (`candidate_corrections.fit_candidates`). For each half of `windows` they are fitted on the other half. On
            the text of its fit a loss is too low, most of all near the output: with losses on that text, `shifted`
            chose 4 layers of the reference model whose removal costs 1.195 times the dense model's perplexity, and with
            halves 4 that cost 1.156.

    Returns:
        The index of the best candidate; among equal losses the first wins.

    Raises:
        StreamlineError: no candidate's loss is finite.
    """
    halves = windows.halves() if correcting else [windows]
    fitted = [fit_candidates(model, each, candidates, removed) for each in reversed(halves)] if correcting else [None]
    with progress_bar(f"trying {len(candidates)} removals", len(windows.ids)) as bar:

        def losses_of(racing: Sequence[int], start: int, end: int) -> torch.Tensor:
            some = [candidates[index] for index in racing]
            found, first = list[torch.Tensor](), 0
            for half, corrections in zip(halves, fitted, strict=True):
                ids = half.ids[max(start - first, 0) : max(end - first, 0)]
                if len(ids):
                    of_racing = corrections and corrections.part(racing)
                    found.append(removal_window_losses(model, ids, some, removed, of_racing))
                first += len(half.ids)
            bar.advance(end - start)
            return torch.cat(found, dim=1)

        return race(losses_of, len(candidates), windows)


def race(losses_of: Callable[[Sequence[int], int, int], torch.Tensor], candidates: int, windows: Windows) -> RaceResult:
    """Find the candidate of lowest summed loss, and drop candidates that can no longer win.

    The winner's loss is computed on all windows. If it is not finite on one of them, the others race again.

    Args:
        losses_of: A function that takes indices of candidates and a range of windows, and returns the losses
            `[candidates, windows]`.
        candidates: The number of candidates.
        windows: The windows.

    Raises:
        StreamlineError: no candidate's loss is finite.
    """
    runners, tried = list(range(candidates)), 0
    while True:
        racing, losses, computed = _raced(losses_of, runners, len(windows.ids))
        tried += computed
        if len(racing) == len(runners) or bool(losses.isfinite().all(1).any()):
            means = mean_losses(losses.sum(1), windows, "removal")
            return RaceResult(racing[means.index(min(means))], tried)
        runners = [index for index in runners if index not in racing]


def _raced(
    losses_of: Callable[[Sequence[int], int, int], torch.Tensor], runners: Sequence[int], total: int
) -> tuple[list[int], torch.Tensor, int]:
    """One race of some candidates over `total` windows.

    Returns:
        The candidates that stayed to the end, their losses `[candidates, windows]`, and the number of windows that
        losses were computed on, summed over the candidates.
    """
    racing, computed = list(runners), 0
    losses = torch.zeros(len(racing), 0, dtype=torch.float64)
    for start in range(0, total, BATCH):
        found = losses_of(racing, start, min(start + BATCH, total))
        computed += found.numel()
        losses = torch.cat([losses, found.nan_to_num(nan=math.inf, posinf=math.inf)], dim=1)
        stay = _in_the_race(losses, total)
        racing, losses = [racing[place] for place in stay], losses[stay]
    return racing, losses, computed


def _in_the_race(losses: torch.Tensor, total: int) -> list[int]:
    """The places of the candidates that may still win.

    Args:
        losses: The loss of each candidate on each window so far, `[candidates, windows]`.
        total: The number of windows of the whole race.
    """
    count = losses.shape[1]
    if count < MIN_WINDOWS or len(losses) == 1:
        return list(range(len(losses)))
    means = losses.mean(1)
    leader = int(means.argmin())
    if not bool(means[leader].isfinite()):
        return list(range(len(losses)))
    differences = losses - losses[leader]
    variances = differences.var(1).nan_to_num(nan=math.inf)
    others = [place for place in range(len(losses)) if place != leader]
    variances = (variances * (count - 1) + variances[others].median() * PRIOR_WINDOWS) / (count - 1 + PRIOR_WINDOWS)
    # The windows are a sample, without replacement, of those that decide.
    errors = (variances / count * (1 - count / total)).sqrt()
    behind = (differences.mean(1) > DEVIATIONS * errors) | ~means.isfinite()
    return [place for place, lost in enumerate(behind.tolist()) if not lost]
