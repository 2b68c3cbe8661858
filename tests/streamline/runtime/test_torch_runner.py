"""The torch runner: a prompt and later tokens give the same logits as one pass over all of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from optimum.streamline.editing.apply import apply_plan, build_replacement
from optimum.streamline.editing.plan import Plan
from optimum.streamline.errors import StreamlineError
from optimum.streamline.runtime.opening import open_runner
from optimum.streamline.runtime.torch_runner import TorchRunner
from tiny import LAYERS, tiny_model, token_ids


@pytest.mark.parametrize("skipped", [False, True])
def test_pieces_give_what_the_whole_gives(tmp_path: Path, skipped: bool) -> None:
    model = tiny_model()
    if skipped:
        plan = Plan(LAYERS, (0, 1), "mlp")
        apply_plan(model, plan, build_replacement(model, plan))
    model.save_pretrained(tmp_path)
    ids = token_ids(2, 12)
    with torch.no_grad():
        expected = model(ids).logits.numpy()
    runner = open_runner(str(tmp_path))
    assert isinstance(runner, TorchRunner)
    first, cache = runner.prefill(ids[:, :6].numpy())
    second, cache = runner.decode(ids[:, 6:9].numpy(), cache)
    rest = []
    for position in range(9, 12):
        logits, cache = runner.decode(ids[:, position : position + 1].numpy(), cache)
        rest.append(logits)
    found = np.concatenate([first, second, *rest], axis=1)
    assert found.dtype == np.float32
    assert np.abs(found - expected).max() < 1e-5


def test_two_prompts_do_not_share_a_cache(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    runner = open_runner(str(tmp_path))
    ids = token_ids(1, 6).numpy()
    assert np.array_equal(runner.prefill(ids)[0], runner.prefill(ids)[0])


def test_half_precision_answers_in_float32(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    logits, _ = open_runner(str(tmp_path), "bf16").prefill(token_ids(1, 6).numpy())
    assert logits.dtype == np.float32


def test_no_model_there(tmp_path: Path) -> None:
    with pytest.raises(StreamlineError, match=r"no config\.json"):
        open_runner(str(tmp_path))
