"""Losses after a removal, compared with the losses of models edited by `apply_plan`."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from transformers import PreTrainedModel

from optimum.streamline.editing.apply import apply_plan
from optimum.streamline.editing.plan import Plan
from optimum.streamline.errors import StreamlineError
from optimum.streamline.models.architectures import ARCHITECTURES, decoder_layers
from optimum.streamline.models.removed_sublayers import SublayerSet, fully_removed_layers, whole_layer
from optimum.streamline.models.skipped_sublayers import ATTENTION, MLP
from optimum.streamline.scoring.ablation import removal_losses
from optimum.streamline.scoring.loss import cross_entropy_sum
from optimum.streamline.text.windows import Windows
from tiny import LAYERS, every, tiny_model, token_ids

WINDOWS = Windows(token_ids(6, 12), "random")  # a whole batch, and a part of one


def literal_loss(model: PreTrainedModel, ids: torch.Tensor) -> float:
    """-mean log p(next token), in float64 from the logits on."""
    with torch.no_grad():
        log_p = model(ids).logits.double().log_softmax(-1)
    losses = [-float(log_p[row, t, ids[row, t + 1]]) for row in range(len(ids)) for t in range(ids.shape[1] - 1)]
    return sum(losses) / len(losses)


def zeroed(model: PreTrainedModel, sublayers: SublayerSet) -> PreTrainedModel:
    """A copy in which hooks zero the output of `sublayers`, and skip the layers that have lost both."""
    model = copy.deepcopy(model)
    row = ARCHITECTURES[model.config.model_type]
    layers = decoder_layers(model, row)
    for layer, sublayer in sublayers:
        if whole_layer(layer) <= sublayers:
            layers[layer].register_forward_hook(lambda _, args, out: args[0])
            continue
        module = layers[layer].get_submodule(row.attention if sublayer == ATTENTION else row.mlp[-1])
        module.register_forward_hook(
            lambda _, args, out: (torch.zeros_like(out[0]), *out[1:]) if isinstance(out, tuple) else out * 0
        )
    return model


def edited(model: PreTrainedModel, sublayers: SublayerSet) -> PreTrainedModel:
    """A copy with `sublayers` removed by `apply_plan`, as it would be saved."""
    model, removed = copy.deepcopy(model), fully_removed_layers(sublayers)
    skipped = tuple(sorted(sublayer for sublayer in sublayers if sublayer[0] not in removed))
    apply_plan(model, Plan(LAYERS, removed, skipped=skipped), None)
    return model


CANDIDATES: list[SublayerSet] = [
    whole_layer(0),
    frozenset({(1, ATTENTION)}),
    frozenset({(2, MLP)}),
    whole_layer(3),
    frozenset({(3, MLP), (4, ATTENTION)}),
    whole_layer(4),
]
REMOVED: SublayerSet = frozenset({*whole_layer(1), (2, ATTENTION), (4, MLP)})


@pytest.mark.parametrize("removed", [frozenset(), REMOVED], ids=["whole", "less"])
@pytest.mark.parametrize("architecture", every())
def test_losses_are_those_of_models_that_lack_the_parts(architecture: str, removed: SublayerSet) -> None:
    model = tiny_model(architecture)
    candidates = [part for part in CANDIDATES if not part & removed]
    losses = removal_losses(model, WINDOWS, candidates, removed)
    expected = [literal_loss(zeroed(model, removed | part), WINDOWS.ids) for part in candidates]
    assert losses == pytest.approx(expected, abs=1e-5)
    saved = [literal_loss(edited(model, removed | part), WINDOWS.ids) for part in candidates]
    assert losses == pytest.approx(saved, abs=1e-5)
    assert len({round(loss, 4) for loss in expected}) == len(expected)


@pytest.mark.parametrize("architecture", every())
def test_the_model_is_left_as_it_was(architecture: str) -> None:
    model = tiny_model(architecture)
    before = [(name, id(module)) for name, module in model.named_modules()]
    logits = model(WINDOWS.ids).logits
    removal_losses(model, WINDOWS, CANDIDATES)
    assert [(name, id(module)) for name, module in model.named_modules()] == before
    assert torch.equal(model(WINDOWS.ids).logits, logits)


def test_the_model_is_left_as_it_was_even_by_an_error() -> None:
    model = tiny_model("opt")
    before = [(name, id(module)) for name, module in model.named_modules()]

    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    hook = model.lm_head.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        removal_losses(model, WINDOWS, CANDIDATES, REMOVED)
    hook.remove()
    assert [(name, id(module)) for name, module in model.named_modules()] == before


def test_what_stands_before_a_candidate_runs_once_a_batch() -> None:
    model, calls = tiny_model(), Counter[int]()
    layers = decoder_layers(model, ARCHITECTURES["llama"])
    for index, layer in enumerate(layers):
        layer.register_forward_hook(lambda *_, index=index: calls.update([index]))
    batches = 2
    removal_losses(model, WINDOWS, [whole_layer(layer) for layer in range(LAYERS)])
    # Once to find what goes into the layers behind it, of which the last has none, and once for each candidate before.
    once = [layer < LAYERS - 1 for layer in range(LAYERS)]
    assert calls == {layer: batches * (once[layer] + layer) for layer in range(LAYERS)}
    calls.clear()
    removal_losses(model, WINDOWS, [whole_layer(3)], whole_layer(1))
    assert calls == {0: batches, 2: batches, 4: batches}


def test_whole_layers_are_those_with_both_sublayers_out() -> None:
    assert fully_removed_layers(REMOVED) == (1,)
    assert fully_removed_layers(whole_layer(3) | whole_layer(0)) == (0, 3)
    assert fully_removed_layers(frozenset()) == ()


def test_a_loss_that_is_not_a_number_is_never_the_lowest() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[0, 0] = torch.nan
    losses = removal_losses(model, WINDOWS, [whole_layer(1), whole_layer(2)])
    assert losses[0] == float("inf") > losses[1]
    with pytest.raises(StreamlineError, match="the loss on the calibration text is not finite for any removal"):
        removal_losses(model, WINDOWS, [whole_layer(1)])


def test_cross_entropy_is_that_of_the_next_tokens() -> None:
    model = tiny_model("gpt2")
    total = cross_entropy_sum(model, WINDOWS.ids).detach()
    assert total.dtype == torch.float64
    assert float(total) / (6 * 11) == pytest.approx(literal_loss(model, WINDOWS.ids), abs=1e-6)
