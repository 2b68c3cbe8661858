"""Training a replacement: it learns, its schedule is right, and the best weights are kept."""

from __future__ import annotations

import copy
import math
import weakref

import pytest
import torch
from transformers import PreTrainedModel

from optimum.streamline.editing.apply import apply_plan, build_replacement
from optimum.streamline.editing.plan import Plan
from optimum.streamline.errors import StreamlineError
from optimum.streamline.healing import transformers_trainer
from optimum.streamline.healing.losses import NotFiniteError
from optimum.streamline.healing.settings import HealSettings, heal_windows
from optimum.streamline.healing.trainable_parts import train_replacement
from optimum.streamline.healing.trainer import split_windows, train
from optimum.streamline.models.architectures import ARCHITECTURES, decoder_layers
from optimum.streamline.text.windows import Windows
from tiny import LAYERS, every, tiny_model, token_ids

WINDOWS = Windows(token_ids(64, 24), "random")


def test_passes_after_the_first_read_versions_of_the_text() -> None:
    ids, weight, read = torch.arange(80).view(20, 4), torch.nn.Parameter(torch.ones(1)), list[torch.Tensor]()

    def loss(batch: torch.Tensor) -> torch.Tensor:
        read.append(batch)
        return weight.square().sum()

    versions = torch.stack([ids + 1000, ids + 2000])
    settings = HealSettings(lr=1e-3, epochs=3, batch=4)
    train([weight], loss, Windows(ids, "counting"), settings, title="", versions=versions)
    seen = torch.cat([batch for batch in read if weight.requires_grad and not torch.equal(batch, ids[-1:])])
    assert len(seen) == 3 * 19 // 4 * 4
    passes = [seen[:19], seen[19:38], seen[38:]]
    for number, windows in enumerate(passes):
        assert set((windows[:, 0] - 1000 * number).tolist()) <= set(range(0, 76, 4))
        assert len(set(windows[:, 0].tolist())) == len(windows)
    assert any(torch.equal(batch, ids[-1:]) for batch in read)  # held out, as it was given


def output_of(model: PreTrainedModel, layer: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """What one of the model's layers puts out."""
    seen: list[torch.Tensor] = []
    hook = layer.register_forward_hook(lambda _, args, output: seen.append(output))
    with torch.no_grad():
        model(ids)
    hook.remove()
    return seen[0]


def outputs(
    model: PreTrainedModel, student: torch.nn.Module, removed: tuple[int, ...], ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the student puts out in a model that has it in its block's first place, and what the block puts out."""
    target = output_of(model, model.model.layers[removed[-1]], ids)
    replaced = copy.deepcopy(model)
    replaced.model.layers[removed[0]] = student
    return output_of(replaced, student, ids), target


def block_error(model: PreTrainedModel, student: torch.nn.Module, removed: tuple[int, ...], ids: torch.Tensor) -> float:
    """The mean squared error of the two."""
    output, target = outputs(model, student, removed, ids)
    return float((output - target).square().mean())


@pytest.mark.parametrize("kind", ["layer", "mlp", "ffn"])
def test_the_replacement_learns_what_its_block_does(kind: str) -> None:
    model, plan = tiny_model(), Plan(LAYERS, (1, 2, 3), kind)
    untouched = copy.deepcopy(model.state_dict())
    replacement = build_replacement(model, plan)
    held_out = token_ids(8, 24, seed=9)
    before = block_error(model, replacement.layer, plan.removed, held_out)
    log = train_replacement(model, plan, replacement.layer, WINDOWS, HealSettings(lr=3e-3, epochs=8))
    after = block_error(model, replacement.layer, plan.removed, held_out)
    assert after < 0.9 * before
    assert log.best < log.before
    assert all(torch.equal(value, untouched[name]) for name, value in model.state_dict().items())
    apply_plan(model, plan, replacement)
    assert model(held_out).logits.isfinite().all()


@pytest.mark.parametrize("architecture", every())
def test_a_layer_of_every_architecture_learns_what_its_block_does(architecture: str) -> None:
    model = tiny_model(architecture)
    plan = Plan(LAYERS, (0, 1), "layer")
    replacement = build_replacement(model, plan)
    log = train_replacement(model, plan, replacement.layer, WINDOWS, HealSettings(lr=3e-3, epochs=1))
    assert log.best < log.before
    before = copy.deepcopy(decoder_layers(model, ARCHITECTURES[architecture])[1])
    apply_plan(model, plan, replacement)
    healed = decoder_layers(model, ARCHITECTURES[architecture])
    assert len(healed) == LAYERS - 1
    assert any(not torch.equal(a, b) for a, b in zip(healed[0].parameters(), before.parameters(), strict=True))
    assert model(token_ids()).logits.isfinite().all()


def test_the_loss_logged_is_the_error_of_the_block() -> None:
    model, plan = tiny_model(), Plan(LAYERS, (1, 2), "layer")
    student = build_replacement(model, plan).layer
    held_out = WINDOWS.ids[-3:]  # 5% of 64, rounded
    expected = block_error(model, student, plan.removed, held_out)
    log = train_replacement(model, plan, student, WINDOWS, HealSettings(lr=1e-3, epochs=1))
    assert log.before == pytest.approx(expected, rel=1e-4)
    assert log.best == pytest.approx(block_error(model, student, plan.removed, held_out), rel=1e-4)


def test_a_normalised_error_is_each_tokens_own_share() -> None:
    model, plan = tiny_model(), Plan(LAYERS, (1, 2), "layer")
    student = build_replacement(model, plan).layer
    output, target = outputs(model, student, plan.removed, WINDOWS.ids[-3:])
    errors = []
    for ours, theirs in zip(output.double().flatten(0, 1), target.double().flatten(0, 1), strict=True):
        errors.append(float(((ours - theirs) @ (ours - theirs)) / (theirs @ theirs)))
    log = train_replacement(model, plan, student, WINDOWS, HealSettings(lr=1e-3, epochs=1), normalised=True)
    assert log.before == pytest.approx(math.fsum(errors) / len(errors), rel=1e-5)


def test_the_rate_rises_then_falls_to_its_minimum_and_not_below_or_back() -> None:
    model, plan = tiny_model(), Plan(LAYERS, (1, 2), "layer")
    settings = HealSettings(lr=1e-3, epochs=6, batch=4, warmup_share=0.1)
    log = train_replacement(model, plan, build_replacement(model, plan).layer, WINDOWS, settings)
    rates = [step.lr for step in log.steps]
    assert len(rates) == 6 * 61 // 4
    peak = rates.index(max(rates))
    assert peak == 8  # the ninth of 91
    assert rates[peak] == pytest.approx(1e-3)
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert rates[0] > 0
    assert rates[-1] == pytest.approx(0.25e-3)
    assert sum(step.held_out is not None for step in log.steps) == 10


@pytest.mark.parametrize(("windows", "updates"), [(8, 1), (16, 2), (24, 3), (5, 1), (30, 3)])
def test_a_short_training_ends_at_the_minimum_too(windows: int, updates: int) -> None:
    model, plan = tiny_model(), Plan(LAYERS, (1, 2), "layer")
    text = Windows(token_ids(windows + max(1, round(windows * 0.05)), 8), "random")
    log = train_replacement(model, plan, build_replacement(model, plan).layer, text, HealSettings(lr=1e-3, epochs=1))
    rates = [step.lr for step in log.steps]
    assert len(rates) == updates
    assert all(rate > 0 for rate in rates)
    assert rates[-1] == pytest.approx(0.25e-3)


def test_time_ends_a_training_and_the_rate_follows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(10**6))
    monkeypatch.setattr(transformers_trainer, "monotonic", lambda: float(next(now)))  # a second a look
    model, plan = tiny_model(), Plan(LAYERS, (1, 2), "layer")
    settings = HealSettings(lr=1e-3, epochs=100, minutes=1)
    log = train_replacement(model, plan, build_replacement(model, plan).layer, WINDOWS, settings)
    rates = [step.lr for step in log.steps]
    assert 55 <= len(rates) <= 62  # of 762
    assert max(rates) > 0.9e-3
    peak = rates.index(max(rates))
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert rates[-1] == pytest.approx(0.25e-3, rel=0.02)
    assert log.steps[-1].held_out is not None


def test_a_training_that_makes_it_worse_keeps_the_best_weights() -> None:
    model, plan = tiny_model(), Plan(LAYERS, (1, 2), "layer")
    student = build_replacement(model, plan).layer
    log = train_replacement(model, plan, student, WINDOWS, HealSettings(lr=1.0, epochs=2))
    assert log.steps[-1].held_out > log.before  # the rate is absurd: it did get worse
    assert log.best <= log.before
    assert block_error(model, student, plan.removed, WINDOWS.ids[-3:]) == pytest.approx(log.best, rel=1e-4)


def test_weights_that_nothing_makes_better_stay_as_they_were() -> None:
    model, plan = tiny_model(), Plan(LAYERS, (1, 2), "layer")
    student = copy.deepcopy(model.model.layers[1])
    for layer in (model.model.layers[1], model.model.layers[2], student):
        layer.mlp.down_proj.weight.data.zero_()
        layer.self_attn.o_proj.weight.data.zero_()  # the block passes on what it is given: no student does it better
    before = copy.deepcopy(student.state_dict())
    log = train_replacement(model, plan, student, WINDOWS, HealSettings(lr=1e-2, epochs=1))
    assert (log.before, log.best, log.best_step) == (0.0, 0.0, 0)
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


def test_the_same_seed_trains_the_same_weights() -> None:
    weights = []
    for seed in (0, 0, 1):
        model, plan = tiny_model(), Plan(LAYERS, (1, 2), "mlp")
        student = build_replacement(model, plan).layer
        train_replacement(model, plan, student, WINDOWS, HealSettings(lr=1e-3, epochs=1, seed=seed))
        weights.append(torch.cat([parameter.flatten() for parameter in student.parameters()]))
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_a_loss_that_is_not_finite_is_an_error_that_names_the_rate() -> None:
    model, plan = tiny_model(), Plan(LAYERS, (1, 2), "layer")
    with pytest.raises(StreamlineError, match=r"heal-lr 1e\+30: the loss is no longer finite"):
        train_replacement(model, plan, build_replacement(model, plan).layer, WINDOWS, HealSettings(lr=1e30, epochs=3))


def test_a_held_out_loss_that_is_not_finite_is_an_error_and_blames_the_rate_only_for_what_it_did() -> None:
    model, plan = tiny_model(), Plan(LAYERS, (1, 2), "layer")
    student = build_replacement(model, plan).layer
    one_update = HealSettings(lr=1e30, epochs=1, batch=61)  # its loss is of the weights before it
    with pytest.raises(
        NotFiniteError, match=r"^heal-lr 1e\+30: the held-out loss is nan at update 1; use a lower rate$"
    ):
        train_replacement(model, plan, student, WINDOWS, one_update)
    student.mlp.down_proj.weight.data.fill_(math.inf)
    with pytest.raises(NotFiniteError, match=r"^model: the held-out loss is nan before the first update; remove fewer"):
        train_replacement(model, plan, student, WINDOWS, HealSettings(lr=1e-3))


def test_no_hidden_state_outlives_its_batch_and_the_rest_of_the_model_is_not_run() -> None:
    model, plan = tiny_model(), Plan(LAYERS, (1, 2), "layer")
    student = build_replacement(model, plan).layer
    inputs: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []
    after_the_block: list[int] = []

    def watch(_: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        alive.append(sum(ref() is not None for ref in inputs))
        inputs.append(weakref.ref(args[0]))

    student.register_forward_pre_hook(watch)
    model.model.layers[3].register_forward_hook(lambda *_: after_the_block.append(1))
    train_replacement(model, plan, student, WINDOWS, HealSettings(lr=1e-3, epochs=2))
    assert len(inputs) > 16
    assert max(alive) <= 1
    assert not after_the_block


def test_a_training_says_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    model, plan = tiny_model(), Plan(LAYERS, (1, 2), "layer")
    train_replacement(model, plan, build_replacement(model, plan).layer, WINDOWS, HealSettings(lr=1e-3, epochs=1))
    assert capfd.readouterr() == ("", "")


def test_too_few_tokens_are_refused() -> None:
    assert heal_windows(1000, 100) == 10
    with pytest.raises(StreamlineError, match="heal-tokens 150: must be at least two windows of 100 tokens, 200"):
        heal_windows(150, 100)


def test_shares_are_the_windows_to_train_on_each_once() -> None:
    parts = [split_windows(WINDOWS, (number, 3)) for number in range(3)]
    assert torch.equal(torch.cat([training for training, _ in parts]), WINDOWS.ids[:-3])
    assert all(torch.equal(held_out, WINDOWS.ids[-3:]) for _, held_out in parts)
    with pytest.raises(StreamlineError, match="heal-tokens: 3 windows to train on, too few for 4 trainings"):
        split_windows(Windows(WINDOWS.ids[:4], "random"), (0, 4))


def test_processes_that_cannot_share_the_windows_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    model, plan = tiny_model(), Plan(LAYERS, (1, 2), "layer")
    student = build_replacement(model, plan).layer
    with pytest.raises(StreamlineError, match="heal-batch 7: must be a multiple of the 2 processes"):
        train_replacement(model, plan, student, WINDOWS, HealSettings(lr=1e-3, batch=7))
    with pytest.raises(StreamlineError, match="heal-tokens: 1 windows to train on, fewer than the 2 processes"):
        train_replacement(model, plan, student, Windows(WINDOWS.ids[:2], "random"), HealSettings(lr=1e-3, epochs=1))
