"""Every method on every architecture: it makes a checkpoint that stock transformers loads, or says why not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from behaviour import greedy, logits, stock_model
from optimum.streamline.checkpoints.loading import load
from optimum.streamline.editing.apply import EditInputs, build_replacement, planned_config
from optimum.streamline.errors import StreamlineError
from optimum.streamline.methods.base import MethodInputs
from optimum.streamline.methods.registry import METHODS, method_of
from optimum.streamline.models.architectures import ARCHITECTURES
from optimum.streamline.models.skipped_sublayers import skipped_of
from optimum.streamline.recipe.parsing import make_recipe
from optimum.streamline.scoring.similarity import measure_scores
from optimum.streamline.text.windows import Windows
from tiny import KIN, LAYERS, NORM_AFTER, tiny_model, token_ids

CALIBRATION, HELD_OUT = Windows(token_ids(3, 12, seed=5), "random"), Windows(token_ids(3, 12, seed=6), "random")
RECIPES: dict[str, dict[str, Any]] = {
    name: {"method": name, "remove": 2} for name in METHODS if name not in ("explicit", "shortened-taylor")
}
RECIPES["explicit"] = {"layers": "1,3"}
RECIPES["auto"]["samples"] = 1  # of the held-out windows, so many are for swaps
# The paper's four first and two last layers are more than there are.
RECIPES["shortened-taylor"] = {"method": "shortened-taylor", "remove": 2, "protect": "1,1"}
RECIPES["shortgpt iterative"] = {"method": "shortgpt", "remove": 2, "iterative": True}
RECIPES["linear"] = {"layers": "1,3", "replacement": "linear"}
RECIPES["corrected"] = {"layers": "1,3", "replacement": "corrected"}
MERGING = {"average", "come", "come-mp", "come-p", "come-sp"}
MIXTURES, POST_NORM, PARALLEL = {"mixtral", "qwen3_moe"}, NORM_AFTER, {"gpt_neox"}
# Only neighbours of one kind are merged; where kinds alternate in `tiny.py`, there are none.
NEIGHBOURS: dict[str, dict[str, Any]] = {
    "qwen2": {"layer_types": ["full_attention"] * 2 + ["sliding_attention"] * 3},
    "smollm3": {"no_rope_layers": [1, 1, 0, 0, 0]},
}


def refused(architecture: str, name: str) -> bool:
    """Whether the method has no meaning there."""
    if name in MERGING:
        return architecture in MIXTURES | POST_NORM
    if name == "corrected":
        return architecture in MIXTURES | POST_NORM | PARALLEL
    if name == "blockpruner":
        return architecture in PARALLEL
    return name == "linear" and architecture in POST_NORM


# Where layers differ most: on these every method is fast. On the others a method of each edit is that
# `test_conformance.py` does not make there; the rest of the product is slow.
DIFFERENT = {"llama", "gpt2", "gemma2", "qwen3_moe"}
ELSEWHERE = {"average", "come", "corrected", "linear"}


@pytest.mark.parametrize(
    ("architecture", "name"),
    [
        pytest.param(
            each, name, marks=pytest.mark.slow if each in KIN or not (each in DIFFERENT or name in ELSEWHERE) else ()
        )
        for each in sorted(ARCHITECTURES)
        for name in RECIPES
    ],
)
def test_what_a_method_leaves_is_a_plain_checkpoint(architecture: str, name: str, tmp_path: Path) -> None:
    fields = NEIGHBOURS.get(architecture, {}) if name in MERGING else {}
    model, recipe, ids = tiny_model(architecture, **fields), make_recipe(RECIPES[name]), token_ids()
    if refused(architecture, name):
        with pytest.raises(StreamlineError, match=architecture):
            method_of(recipe, model.config)
        return
    method, before = method_of(recipe, model.config), logits(model, ids)
    untouched = {key: value.clone() for key, value in model.state_dict().items()}
    plan = method.plan(recipe, MethodInputs(model, CALIBRATION, measure_scores(model, CALIBRATION), HELD_OUT))
    assert all(torch.equal(value, untouched[key]) for key, value in model.state_dict().items())
    assert torch.equal(logits(model, ids), before)
    expected = planned_config(model.config, plan).to_dict()
    change = method.apply(model, plan, EditInputs(CALIBRATION, build_replacement(model, plan, CALIBRATION, 0)))
    edited = logits(model, ids)
    assert edited.isfinite().all()
    assert (edited - before).abs().max() > 1e-3
    assert model.config.to_dict() == expected
    assert model.config.num_hidden_layers == len(change.new_layers) == len(plan.new_layers) == LAYERS - 2
    assert not skipped_of(model.config)

    model.save_pretrained(tmp_path)
    stock = stock_model(tmp_path)
    torch.testing.assert_close(logits(stock, ids), edited, atol=1e-5, rtol=0)
    ours = load(str(tmp_path))
    torch.testing.assert_close(logits(ours, ids), edited, atol=1e-5, rtol=0)
    assert greedy(ours, use_cache=True) == greedy(stock, use_cache=False)
