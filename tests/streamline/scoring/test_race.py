"""Races of removals: the choice of the full comparison, at a part of its cost."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from optimum.streamline.errors import StreamlineError
from optimum.streamline.models.removed_sublayers import whole_layer
from optimum.streamline.scoring.ablation import removal_losses
from optimum.streamline.scoring.race import MIN_WINDOWS, RaceResult, race, race_removals
from optimum.streamline.text.windows import Windows
from tiny import LAYERS, tiny_model, token_ids

WINDOWS = 48
TEXT = Windows(torch.zeros(WINDOWS, 8, dtype=torch.long), "none")


def raced(losses: torch.Tensor) -> RaceResult:
    """A race of candidates with these losses `[candidates, windows]`."""

    def losses_of(racing: Sequence[int], start: int, end: int) -> torch.Tensor:
        return losses[list(racing), start:end]

    return race(losses_of, len(losses), TEXT.part(0, losses.shape[1]))


def drawn(seed: int, spread: float) -> torch.Tensor:
    """Losses of 20 candidates: the windows differ much more than the candidates on one window."""
    draw = torch.Generator().manual_seed(seed)
    windows = 300 + 60 * torch.randn(1, WINDOWS, generator=draw, dtype=torch.float64)
    candidates = spread * torch.rand(20, 1, generator=draw, dtype=torch.float64)
    return windows + candidates + 5 * torch.randn(20, WINDOWS, generator=draw, dtype=torch.float64)


def test_it_chooses_what_the_full_comparison_chooses_at_a_part_of_the_cost() -> None:
    results = [(raced(losses := drawn(seed, 40)), losses) for seed in range(100)]
    same = sum(result.best == int(losses.sum(1).argmin()) for result, losses in results)
    cost = sum(result.tried for result, _ in results) / sum(losses.numel() for _, losses in results)
    assert same >= 95
    assert cost < 1 / 2


def test_what_lies_far_behind_leaves_early() -> None:
    losses = torch.full((5, WINDOWS), 10.0, dtype=torch.float64) + torch.rand(5, WINDOWS, dtype=torch.float64)
    losses[3] -= 8
    assert raced(losses) == RaceResult(3, 5 * MIN_WINDOWS + (WINDOWS - MIN_WINDOWS))


def test_a_winner_that_fails_later_gives_way_to_the_others() -> None:
    losses = torch.full((5, WINDOWS), 10.0, dtype=torch.float64) + torch.rand(5, WINDOWS, dtype=torch.float64)
    losses[3] -= 8
    losses[1] -= 4
    losses[3, -1] = torch.nan
    assert raced(losses).best == 1


def test_close_candidates_are_compared_on_every_window() -> None:
    draw = torch.Generator().manual_seed(0)
    losses = torch.randn(2, WINDOWS, generator=draw, dtype=torch.float64)
    losses[1] += losses[0].mean() - losses[1].mean() - 1e-6  # the better one by a hair
    assert raced(losses) == RaceResult(1, 2 * WINDOWS)


def test_equal_losses_go_to_the_first() -> None:
    losses = torch.ones(3, WINDOWS, dtype=torch.float64)
    assert raced(losses).best == 0


@pytest.mark.parametrize("fault", [float("nan"), float("inf")])
def test_a_loss_that_is_not_a_number_never_wins(fault: float) -> None:
    losses = drawn(0, 40)
    best = int(losses.sum(1).argmin())
    losses[best, 5] = fault
    assert raced(losses).best != best
    losses[:, 0] = fault
    with pytest.raises(StreamlineError, match="is not finite for any removal tried"):
        raced(losses)


def test_a_race_of_a_model_is_the_full_comparison_of_it() -> None:
    cost = 0.0
    for seed in range(3):
        model, windows = tiny_model("llama", seed), Windows(token_ids(16, 12, seed=seed), "random")
        with torch.no_grad():  # the removal of layer 3 is much better than others
            for name, value in model.model.layers[3].named_parameters():
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    value.mul_(1e-3)
        candidates = [whole_layer(layer) for layer in range(1, LAYERS)]
        losses = removal_losses(model, windows, candidates, whole_layer(0))
        result = race_removals(model, windows, candidates, whole_layer(0))
        assert result.best == losses.index(min(losses))
        cost += result.tried / (3 * len(candidates) * len(windows.ids))
    assert MIN_WINDOWS / 16 < cost < 1
