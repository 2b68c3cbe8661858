"""Scoring keeps no hidden state after its batch. `models/test_architectures.py` checks the values."""

from __future__ import annotations

import weakref

import pytest
import torch

from optimum.streamline.errors import StreamlineError
from optimum.streamline.scoring.similarity import measure_scores
from optimum.streamline.text.windows import BATCH, Windows
from tiny import LAYERS, tiny_model, token_ids


def test_one_pass_and_nothing_kept() -> None:
    model, windows = tiny_model(), Windows(token_ids(10 * BATCH, 16), "random")
    outputs: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []

    def watch(_: torch.nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        alive.append(sum(ref() is not None for ref in outputs))
        outputs.append(weakref.ref(output))

    model.model.layers[2].register_forward_hook(watch)
    measure_scores(model, windows)
    assert len(outputs) == 10  # one forward pass a batch, all scores from it
    assert max(alive) <= 1


def test_windows_in_any_batching_score_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    model, windows = tiny_model(), Windows(token_ids(7, 30), "random")
    whole = torch.tensor(measure_scores(model, windows).similarity)
    monkeypatch.setattr("optimum.streamline.scoring.similarity.BATCH", 3)
    monkeypatch.setattr("optimum.streamline.scoring.similarity.CHUNK_TOKENS", 11)
    torch.testing.assert_close(torch.tensor(measure_scores(model, windows).similarity), whole, atol=1e-6, rtol=0)


def test_every_block_length_comes_from_the_same_pass() -> None:
    scores = measure_scores(tiny_model(), Windows(token_ids(4, 16), "random"))
    for length in range(1, LAYERS + 1):
        similarity = scores.block_similarity(length)
        assert len(similarity) == LAYERS - length + 1
        assert all(-1 <= value <= 1 for value in similarity)
    assert scores.block_influence == tuple(1 - value for value in scores.block_similarity(1))
    assert all(scores.similarity[i][i] == pytest.approx(1) for i in range(LAYERS + 1))


def test_no_hook_is_left_behind() -> None:
    model = tiny_model()
    measure_scores(model, Windows(token_ids(2, 8), "random"))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.model.layers)


def test_an_output_that_is_not_finite_names_its_layer() -> None:
    model = tiny_model()
    model.model.layers[3].register_forward_hook(lambda _, args, output: output * torch.inf)
    with pytest.raises(StreamlineError, match="the output of layer 3 is not finite"):
        measure_scores(model, Windows(token_ids(2, 8), "random"))
