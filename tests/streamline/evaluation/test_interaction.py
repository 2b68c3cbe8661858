"""The interaction of pruning and quantizing, and its wording, on figures with a known answer."""

from __future__ import annotations

import numpy as np
import pytest

from optimum.streamline.evaluation.accuracy import Accuracy
from optimum.streamline.evaluation.interaction import interaction
from optimum.streamline.evaluation.results import Interaction
from optimum.streamline.reporting.interaction_wording import cells, interaction_sentence

WINDOWS, TOKENS = 40, 10
LABELS = ("dense", "pruned", "int4", "pruned, int4")


def accuracy(mean: float, noise: float = 0.0, seed: int = 0) -> Accuracy:
    """Losses of `mean` nats a token, that of each window off by some noise."""
    off = np.random.default_rng(seed).normal(0, noise, WINDOWS) if noise else np.zeros(WINDOWS)
    loss = (mean + off) * TOKENS
    return Accuracy(loss, np.zeros(WINDOWS), np.zeros(WINDOWS), np.full(WINDOWS, float(TOKENS)))


def found(both: float, noise: float = 0.0) -> Interaction:
    losses = (accuracy(2.0), accuracy(2.3), accuracy(2.1), accuracy(both, noise))
    return interaction("int4", "prune,quantize", LABELS, dict(zip(LABELS, losses, strict=True)), 0)


def test_it_is_what_both_cost_beyond_their_sum() -> None:
    each = found(2.45)
    figures = (each.pruning, each.quantizing, each.together, each.term)
    assert [figure.value for figure in figures if figure] == pytest.approx([0.3, 0.1, 0.45, 0.05])
    assert interaction_sentence(each) == "quantizing costs 0.0500 nats per token more after pruning"
    assert cells(each)[:2] == ["int4", "prune, then quantize"]
    assert cells(each)[5].startswith("0.0500")


def test_less_than_the_sum_is_said_too() -> None:
    assert interaction_sentence(found(2.35)) == "quantizing costs 0.0500 nats per token less after pruning"


def test_what_noise_covers_is_additive() -> None:
    each = found(2.41, noise=0.2)
    assert each.term is not None
    assert each.term.low < 0 < each.term.high
    assert interaction_sentence(each) == "additive within the interval"


def test_pairing_takes_out_what_windows_have_in_common() -> None:
    # Windows differ a hundred times as much as the models do; the interval does not know of it.
    losses = [accuracy(mean, noise=1.0, seed=7) for mean in (2.0, 2.3, 2.1, 2.45)]
    each = interaction("int4", "prune,quantize", LABELS, dict(zip(LABELS, losses, strict=True)), 0)
    assert each.term is not None
    assert each.term.high - each.term.low < 1e-9


def test_the_other_order_is_read_in_its_own_words() -> None:
    each = interaction(
        "int4",
        "quantize,prune",
        LABELS,
        dict(zip(LABELS, (accuracy(2.0), accuracy(2.3), accuracy(2.1), accuracy(2.45)), strict=True)),
        0,
    )
    assert interaction_sentence(each) == "pruning costs 0.0500 nats per token more in the quantized model"


def test_a_broken_model_and_a_missing_one_are_said_so() -> None:
    assert (
        interaction_sentence(found(float("nan"))) == "not a number: the logits of a model are not finite on this text"
    )
    missing = Interaction("bnb-nf4", "quantize,prune", missing="heal 'lm': needs float weights")
    assert interaction_sentence(missing) == "not measured: heal 'lm': needs float weights"
    assert cells(missing)[2:6] == ["", "", "", ""]
