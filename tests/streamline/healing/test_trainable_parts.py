"""Training a model or one submodule: losses and updates compared with slow ones, and weights that must not change."""

from __future__ import annotations

import copy
import dataclasses
import gc
import itertools
import math
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel

from behaviour import stock_model
from optimum.streamline.editing.apply import EditInputs, apply_plan, build_replacement
from optimum.streamline.editing.plan import Plan
from optimum.streamline.healing import stages, transformers_trainer
from optimum.streamline.healing.losses import Distillation, NextToken, outputs_of
from optimum.streamline.healing.settings import (
    HealSettings,
    default_lora_lr,
    default_lr,
    default_model_lr,
    distillation_weights,
    model_settings,
    replacement_settings,
    scope_of,
)
from optimum.streamline.healing.stages import Healer
from optimum.streamline.healing.trainable_parts import train_model
from optimum.streamline.methods.base import MethodInputs
from optimum.streamline.methods.registry import method_of
from optimum.streamline.model_files.source import ModelSource
from optimum.streamline.models.architectures import ARCHITECTURES, architecture_of, decoder_layers
from optimum.streamline.pipeline.prune import prepare, prune
from optimum.streamline.recipe.healing import KL_WITH_REPLACED, REPLACED, Healing
from optimum.streamline.recipe.parsing import make_recipe
from optimum.streamline.recipe.recipe import Recipe
from optimum.streamline.scoring.similarity import measure_scores
from optimum.streamline.text.windows import Windows
from reference import REFERENCE
from tiny import LAYERS, every, tiny_model, token_ids

WINDOWS = Windows(token_ids(40, 24), "random")
HELD_OUT = WINDOWS.ids[-2:]  # 5% of 40
# A text with something to learn: every token follows from the one before.
COUNTING = Windows((torch.arange(40)[:, None] + torch.arange(24)) % 50 + 2, "counting")
ONE_PASS = HealSettings(lr=1e-3, epochs=1)
# LayerChop's: see `model_settings`.
ALL_WEIGHTS = {"betas": (0.9, 0.95), "weight_decay": 0.1, "decay_vectors": False, "clip": 1.0, "min_lr_share": 0.1}


def edited(kind: str = "none", removed: tuple[int, ...] = (1, 3)) -> tuple[PreTrainedModel, PreTrainedModel, Plan]:
    """A model edited by a plan, the original, and the plan."""
    original, plan = tiny_model(), Plan(LAYERS, removed, kind)
    model = copy.deepcopy(original)
    apply_plan(model, plan, build_replacement(model, plan))
    return model, original, plan


def raw_states(model: PreTrainedModel, ids: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Logits, and the raw output of every layer, in float64."""
    model = copy.deepcopy(model).double()
    states: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _, args, out: states.append(out[0] if isinstance(out, tuple) else out))
    with torch.no_grad():
        return model(ids).logits, states


def literal_cross_entropy(model: PreTrainedModel, ids: torch.Tensor) -> float:
    logits, _ = raw_states(model, ids)
    losses = []
    for row, tokens in zip(logits, ids, strict=True):
        for here, following in zip(row[:-1], tokens[1:], strict=True):
            losses.append(-float(here[following] - torch.logsumexp(here, 0)))
    return math.fsum(losses) / len(losses)


def literal_kl(teacher: PreTrainedModel, model: PreTrainedModel, ids: torch.Tensor) -> float:
    theirs, ours = (raw_states(each, ids)[0].flatten(0, 1) for each in (teacher, model))
    sums = []
    for there, here in zip(theirs, ours, strict=True):
        p, q = torch.exp(there) / torch.exp(there).sum(), torch.exp(here) / torch.exp(here).sum()
        sums.append(float(sum(p[i] * math.log(p[i] / q[i]) for i in range(len(p)))))
    return math.fsum(sums) / len(sums)


def literal_hidden(
    teacher: PreTrainedModel, model: PreTrainedModel, depths: tuple[int, ...], ids: torch.Tensor
) -> float:
    theirs, ours = (raw_states(each, ids)[1] for each in (teacher, model))
    layers = []
    for k, depth in enumerate(depths):
        s, t = ours[k].flatten(0, 1), theirs[depth - 1].flatten(0, 1)
        layers.append(sum(float((a - b) @ (a - b) / (b @ b)) for a, b in zip(s, t, strict=True)) / len(s))
    return sum(layers) / len(layers)


@pytest.mark.parametrize(("kl", "hidden"), [(1.0, 0.0), (0.3, 0.0), (0.0, 0.0), (0.6, 2.0)])
def test_distillation_is_its_three_parts(kl: float, hidden: float) -> None:
    model, original, plan = edited()
    expected = kl * literal_kl(original, model, HELD_OUT) + (1 - kl) * literal_cross_entropy(model, HELD_OUT)
    expected += hidden * literal_hidden(original, model, (2, 4, 5), HELD_OUT)
    goal = Distillation(partial(outputs_of, original), plan.depths, kl, hidden)
    assert goal.loss(model, HELD_OUT).item() == pytest.approx(expected, rel=1e-5)
    log = train_model(model, goal, WINDOWS, ONE_PASS)
    assert log.before == pytest.approx(expected, rel=1e-5)
    assert log.best < log.before


def test_next_token_is_cross_entropy() -> None:
    model, _, _ = edited()
    before = literal_cross_entropy(model, COUNTING.ids[-2:])
    log = train_model(model, NextToken(), COUNTING, HealSettings(lr=3e-3, epochs=2))
    assert log.before == pytest.approx(before, rel=1e-5)
    assert log.best == pytest.approx(literal_cross_entropy(model, COUNTING.ids[-2:]), rel=1e-5)
    assert log.best < log.before


def test_the_loop_is_adamw_with_clipping_a_cosine_and_decay_on_matrices() -> None:
    model, _, _ = edited()
    text = Windows(token_ids(8, 16)[[*range(8), 0]], "random")  # judged on one it is trained on: every update helps
    ours = copy.deepcopy(model)
    settings = HealSettings(lr=2e-2, epochs=6, batch=8, warmup_share=0.34, **{**ALL_WEIGHTS, "clip": 0.5})
    log = train_model(ours, NextToken(), text, settings)
    assert log.best_step == 6

    theirs = model.double()  # every update sees all eight windows: their order is of no account
    state = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in theirs.named_parameters()}
    for step in range(1, 7):
        progress = (step - 2) / 4
        rate = 2e-2 * (step / 2 if step <= 2 else 0.1 + 0.9 * (1 + math.cos(math.pi * progress)) / 2)
        assert log.steps[step - 1].lr == pytest.approx(rate)
        logits = theirs(text.ids[:8]).logits[:, :-1]
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), text.ids[:8, 1:].flatten())
        theirs.zero_grad()
        loss.backward()
        assert log.steps[step - 1].loss == pytest.approx(loss.item(), rel=1e-4)
        norm = math.sqrt(sum(float(p.grad.square().sum()) for p in theirs.parameters()))
        assert norm > 0.5
        for name, p in theirs.named_parameters():
            gradient, (first, second) = 0.5 * p.grad / norm, state[name]
            first.mul_(0.9).add_(0.1 * gradient)
            second.mul_(0.95).add_(0.05 * gradient**2)
            decay = 0.1 if p.ndim == 2 else 0.0
            step_size = (first / (1 - 0.9**step)) / ((second / (1 - 0.95**step)).sqrt() + 1e-8)
            p.data -= rate * (decay * p.data + step_size)
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.double(), other, rtol=0, atol=3e-4, msg=name)


def test_a_part_is_trained_through_the_rest() -> None:
    model, _, _ = edited("layer", (1, 2, 3))
    before = copy.deepcopy(model.state_dict())
    log = train_model(model, NextToken(), COUNTING, HealSettings(lr=1e-3, epochs=1), part=model.model.layers[1])
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if name.startswith("model.layers.1.")}
    assert log.best < log.before
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("architecture", "rank"),
    [*(pytest.param(*each.values, None, marks=each.marks) for each in every()), ("qwen2", 4), ("gpt2", 4)],
)
def test_dead_sublayers_stay_as_they_were_and_the_model_a_plain_one(architecture: str, rank: int | None) -> None:
    model = tiny_model(architecture)
    plan = Plan(LAYERS, (), skipped=((1, "attention"), (2, "mlp")))
    teacher = copy.deepcopy(model)
    apply_plan(model, plan, None)
    before, config, modules = copy.deepcopy(model.state_dict()), model.config.to_dict(), repr(model)
    numbers = [getattr(module, "layer_idx", None) for module in model.modules()]
    with torch.no_grad():
        loss = float(Distillation(partial(outputs_of, teacher), plan.depths, 0.5, 1.0).loss(model, HELD_OUT))
    settings = HealSettings(lr=3e-3, epochs=1, lora_rank=rank, weight_decay=0.1)
    log = train_model(model, Distillation(partial(outputs_of, teacher), plan.depths, 0.5, 1.0), WINDOWS, settings)
    assert log.before == pytest.approx(loss, rel=1e-5)
    assert log.best < log.before
    after = model.state_dict()
    assert list(after) == list(before)
    assert (model.config.to_dict(), repr(model), type(model)) == (config, modules, type(teacher))
    assert [getattr(module, "layer_idx", None) for module in model.modules()] == numbers
    row = ARCHITECTURES[architecture]
    prefixes = [f"{row.layers}.1.{row.attention}.", *(f"{row.layers}.2.{path}." for path in row.mlp)]
    skipped = [name for name in before if name.startswith(tuple(prefixes))]
    assert skipped
    assert all(torch.equal(after[name], before[name]) for name in skipped)
    assert any(not torch.equal(after[name], before[name]) for name in before if name.startswith(f"{row.layers}.0."))
    with torch.no_grad():
        assert float(
            Distillation(partial(outputs_of, teacher), plan.depths, 0.5, 1.0).loss(model, HELD_OUT)
        ) == pytest.approx(log.best, rel=1e-4)


def test_adapters_change_linear_layers_by_a_low_rank() -> None:
    model, _, _ = edited()
    before = copy.deepcopy(model.state_dict())
    train_model(model, NextToken(), COUNTING, HealSettings(lr=1e-2, epochs=1, lora_rank=2))
    changed = set()
    for name, value in model.state_dict().items():
        if not torch.equal(value, before[name]):
            changed.add(name)
            assert torch.linalg.matrix_rank((value - before[name]).double(), rtol=1e-4) <= 2
    assert changed == {name for name in before if "layers" in name and name.endswith("proj.weight")}


def test_dropout_is_off() -> None:
    model = tiny_model("gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5).train()
    teacher = tiny_model("gpt2", seed=1, resid_pdrop=0.5).train()
    text, plan = Windows(token_ids(9, 16), "random"), Plan(LAYERS, ())
    healer = Healer(make_recipe({"layers": "1", "heal": "distill"}), model, plan, text, [].append, teacher=teacher)
    goal = healer._healing_loss("distill", plan.new_layers)
    assert not teacher.training
    model.eval()
    with torch.no_grad():
        expected = float(goal.loss(model, text.ids[:8]))
    model.train()
    log = train_model(model, goal, text, ONE_PASS)
    assert log.steps[0].loss == pytest.approx(expected, rel=1e-4)


def test_only_later_passes_of_distillation_replace_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    given = dict[str, Any]()
    monkeypatch.setattr(stages, "train_model", lambda *_, title, versions=None, **__: given.update({title: versions}))
    monkeypatch.setattr(Healer, "_note", lambda *_: None)
    plan, versions = Plan(LAYERS, (1,)), torch.zeros(1)
    for trainings in ("lm", "distill"):
        recipe = make_recipe({"layers": "1", "heal": trainings})
        healer = Healer(recipe, tiny_model(), plan, WINDOWS, [].append, teacher=tiny_model(), versions=versions)
        healer.after_edit(plan.new_layers)
        assert (given["training the model"] is versions) == (trainings == "distill")


@pytest.mark.parametrize(
    ("fields", "share"),
    [
        ({"heal": "distill"}, REPLACED),
        ({"heal": "distill", "heal_replace": 0.1}, 0.1),
        ({"heal": "distill", "heal_epochs": 1}, 0.0),
        ({"heal": "distill", "heal_epochs": 1, "heal_replace": 0.1}, 0.0),
        ({"heal": "distill", "heal_cache": "full"}, 0.0),
        ({"heal": "distill", "heal_cache": "full", "heal_replace": 0.1}, 0.1),
        ({"heal": "distill", "heal_cache": "none"}, REPLACED),
        ({"heal": "lm"}, 0.0),
    ],
)
def test_the_share_of_replaced_tokens_follows_the_recipe(fields: dict[str, Any], share: float) -> None:
    recipe = make_recipe({"layers": "1", **fields})
    assert recipe.resolved_replace == share
    assert model_settings(recipe, tiny_model(), recipe.resolved_trainings[0]).replaced == share
    assert replacement_settings(recipe, 64, recipe.resolved_trainings[0]).replaced == share
    assert replacement_settings(recipe, 64, "hidden-mse").replaced == 0


@pytest.mark.parametrize(
    ("fields", "weight"),
    [
        ({}, KL_WITH_REPLACED),
        ({"heal_epochs": 1, "heal_tokens": 10**6}, 1.0),
        ({"heal_epochs": 3}, 1.0),
        ({"heal_tokens": 100_000}, 1.0),
        ({"heal_tokens": 100_000, "heal_epochs": 8}, KL_WITH_REPLACED),
        ({"heal_replace": 0.0}, 1.0),
        ({"heal_cache": "full"}, 1.0),
        ({"heal_kl": 1.0}, 1.0),
        ({"heal_kl": 0.5, "heal_epochs": 1}, 0.5),
    ],
)
def test_the_next_token_has_a_part_where_tokens_are_replaced(fields: dict[str, Any], weight: float) -> None:
    assert distillation_weights(make_recipe({"layers": "1", "heal": "distill", **fields})) == (weight, 10.0)


def test_the_teacher_is_left_alone() -> None:
    model, original, plan = edited()
    before = copy.deepcopy(original.state_dict())
    train_model(model, Distillation(partial(outputs_of, original), plan.depths, 1.0, 1.0), WINDOWS, ONE_PASS)
    assert all(torch.equal(value, before[name]) for name, value in original.state_dict().items())
    assert all(parameter.grad is None for parameter in original.parameters())


@pytest.mark.parametrize(
    ("fields", "trained", "scopes"),
    [
        ({"heal": "hidden-mse+lm", "replacement": "layer"}, True, ["replacement", "model"]),
        ({"heal": "lm+distill", "replacement": "layer"}, True, ["replacement", "model"]),
        ({"heal": "distill", "replacement": "layer"}, True, ["model"]),
        ({"heal": "lm", "replacement": "layer", "lora": True}, True, ["model"]),
        ({"heal": "lm+lm", "replacement": "layer", "lora": True}, True, ["replacement", "model"]),
        ({"heal": "lm+distill", "replacement": "ffn", "lora": True}, True, ["replacement", "model"]),
        ({"heal": "hidden-mse+lm", "replacement": "layer", "lora": True}, True, ["replacement", "model"]),
        ({"heal": "lm+lm", "lora": True}, False, ["model", "model"]),
        ({"heal": "lm", "replacement": "layer", "heal_scope": "model"}, True, ["model"]),
        ({"heal": "distill", "replacement": "layer", "heal_scope": "replacement"}, True, ["replacement"]),
        ({"heal": "lm"}, False, ["model"]),
    ],
)
def test_what_is_trained_by_default(fields: dict[str, object], trained: bool, scopes: list[str]) -> None:
    recipe = make_recipe(fields)
    assert [scope_of(recipe, number, trained) for number in range(len(recipe.resolved_trainings))] == scopes


def test_an_lm_before_adapters_trains_the_replacements_own_weights() -> None:
    model, _, plan = edited("layer", (1, 2, 3))
    fields = {"heal": "lm+lm", "lora": True, "lora_rank": 2, "heal_epochs": 1, "heal_lr": 1e-2}
    recipe = make_recipe({"remove": 2, "replacement": "layer", **fields})
    states: list[dict[str, torch.Tensor]] = []  # before each training, and at the end
    healer = Healer(recipe, model, plan, COUNTING, lambda _: states.append(copy.deepcopy(model.state_dict())))
    healer.before_edit(None)
    healer.after_edit(plan.new_layers)
    states.append(model.state_dict())
    trained = [(healed.scope, healed.settings.lora_rank) for healed in healer.results]
    assert trained == [("replacement", None), ("model", 2)]
    alone, whole = (
        {name for name in before if not torch.equal(before[name], after[name])}
        for before, after in itertools.pairwise(states)
    )
    assert alone == {name for name in states[0] if name.startswith("model.layers.1.")}
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.linalg.matrix_rank((states[1][name] - states[0][name]).double(), rtol=1e-4) > 2
    assert whole == {name for name in states[0] if "layers" in name and name.endswith("proj.weight")}


def test_what_adapters_healed_is_saved_as_a_plain_checkpoint(tmp_path: Path) -> None:
    source, text, out = tmp_path / "model", tmp_path / "text.txt", tmp_path / "out"
    tiny_model(vocab_size=4096).save_pretrained(source)
    AutoTokenizer.from_pretrained(REFERENCE).save_pretrained(source)
    text.write_text(" ".join(f"{number} {'abc'[number % 3] * 4}" for number in range(1000)))
    fields = {"remove": 2, "replacement": "layer", "heal": "hidden-mse+lm", "lora": True, "heal_tokens": 640}
    texts = {"calibration": str(text), "heal_data": str(text), "samples": 2, "length": 32}
    recipe = make_recipe({**fields, **texts})
    windows = prepare(ModelSource(str(source)), recipe, [].append).heal_text
    record = prune(ModelSource(str(source)), recipe, out, overwrite=False, verbose=False, notify=[].append)
    trained = [(healed.stage, healed.settings.lora_rank) for healed in record.healing]
    assert trained == [("hidden-mse", None), ("lm", 16)]
    assert all(healed.log.best < healed.log.before for healed in record.healing)
    stock = stock_model(out)
    assert stock.config.num_hidden_layers == LAYERS - 2
    assert not [file.name for file in out.iterdir() if "adapter" in file.name]
    assert not [name for name in load_file(out / "model.safetensors") if "lora" in name or "base_layer" in name]
    # What the adapters learned is in the weights.
    assert literal_cross_entropy(stock, windows.ids[-1:]) == pytest.approx(record.healing[-1].log.best, rel=1e-5)


def test_settings_are_the_recipes_over_the_papers() -> None:
    recipe, model = Recipe(healing=Healing(epochs=3, batch=2, minutes=1.5), seed=5), tiny_model()
    alone, whole = replacement_settings(recipe, 128, "lm"), model_settings(recipe, model, "lm")
    assert (alone.lr, alone.clip, alone.min_lr_share, alone.betas) == (default_lr(128), 5.0, 0.25, (0.9, 0.95))
    assert default_lr(4096) == 2e-4  # the paper's
    assert default_lr(1024) == pytest.approx(8e-4)
    assert (whole.lr, whole.clip, whole.weight_decay, whole.decay_vectors) == (3e-4, 1.0, 0.1, False)
    assert (whole.min_lr_share, whole.betas) == (0.1, (0.9, 0.95))
    distilled = model_settings(recipe, model, "distill")
    assert (distilled.clip, distilled.weight_decay) == (1.0, 0.0)
    assert (distilled.min_lr_share, distilled.betas) == (0.0, (0.9, 0.999))
    for settings in (alone, whole, distilled):
        assert (settings.epochs, settings.batch, settings.minutes, settings.seed) == (3, 2, 1.5, 5)
    adapted = model_settings(Recipe(healing=Healing(lora=True, lora_rank=3)), model, "lm")
    assert (adapted.lr, adapted.lora_rank, adapted.weight_decay) == (default_lora_lr(128, "lm"), 3, 0.0)
    given = Recipe(healing=Healing(lr=0.5))
    assert model_settings(given, model, "lm").lr == replacement_settings(given, 128, "lm").lr == 0.5


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_rates_follow_the_weights_and_the_width(name: str) -> None:
    model = tiny_model(name)
    layers = decoder_layers(model, architecture_of(model.config))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7.0)  # embeddings, norms and biases do not count
        for matrix in (each for each in layers.parameters() if each.ndim > 1):
            matrix.zero_()  # nor do matrices of zeros
        matrices = [each for each in layers[1].parameters() if each.ndim > 1]
        for number, matrix in enumerate(matrices, start=1):
            matrix.copy_(0.01 * number * torch.randn_like(matrix).sign())
    rms = math.sqrt(median((0.01 * number) ** 2 for number in range(1, len(matrices) + 1)))
    expected = rms / math.sqrt(model.config.hidden_size)
    for dtype in (torch.float32, torch.bfloat16):
        assert default_model_lr(model.to(dtype), "distill") == pytest.approx(0.22 * expected, rel=0.01)
    assert default_model_lr(model, "local") == pytest.approx(0.9 * expected, rel=0.01)
    assert default_model_lr(model, "lm") == 3e-4
    recipe = Recipe(healing=Healing(lora=True))
    assert model_settings(recipe, model, "distill").lr == default_lora_lr(model.config.hidden_size, "distill")
    assert (default_lora_lr(1024, "distill"), default_lora_lr(1024, "lm")) == (pytest.approx(18e-4), 9e-4)


def test_the_rates_are_those_of_the_original() -> None:
    recipe = make_recipe({"layers": "1,3", "heal": "local+distill", "heal_batch": 2, "heal_epochs": 1})
    student, teacher, plan = edited()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(2)
    healer = Healer(recipe, student, plan, COUNTING, lambda _: None, teacher=teacher)
    healer.after_edit(plan.new_layers)
    assert [result.settings.lr for result in healer.results] == [
        default_model_lr(teacher, result.stage) for result in healer.results
    ]
    assert {result.stage for result in healer.results} == {"local", "distill"}


def test_come_mp_distils_after_every_merge_each_time_on_other_windows() -> None:
    original = tiny_model()
    model, calibration = copy.deepcopy(original), Windows(token_ids(4, 24, seed=3), "random")
    recipe = make_recipe({"method": "come-mp", "remove": 2, "heal_epochs": 1, "heal_batch": 19, "heal_lr": 1e-3})
    method = method_of(recipe, model.config)
    plan = method.plan(recipe, MethodInputs(model, calibration, measure_scores(model, calibration)))
    said: list[str] = []
    healer = Healer(recipe, model, plan, WINDOWS, said.append)
    healer.before_edit(None)
    stages: list[tuple[PreTrainedModel, tuple[int, ...]]] = []

    def after_merge(new_layers: tuple[object, ...]) -> None:
        stages.append((copy.deepcopy(model), tuple(layer.originals[-1] + 1 for layer in new_layers)))
        healer.after_merge(new_layers)

    change = method.apply(model, plan, EditInputs(calibration, None, after_merge))
    stages.append((copy.deepcopy(model), plan.depths))
    healer.after_edit(change.new_layers)

    assert [(healed.stage, healed.scope) for healed in healer.results] == [("distill", "model")] * 2
    assert said == ["training the model (distill) on 19 windows, 1 pass"] * 2
    assert [len(depths) for _, depths in stages] == [4, 3]
    # Of the 38 windows that are not held out, the first half after the first merge, the other after the second.
    for (before, depths), healed, ids in zip(stages, healer.results, WINDOWS.ids[:38].split(19), strict=True):
        expected = literal_kl(original, before, ids) + 10 * literal_hidden(original, before, depths, ids)
        assert [step.loss for step in healed.log.steps] == [pytest.approx(expected, rel=1e-4)]


@pytest.mark.parametrize(("method", "trainings"), [("come-sp", 1), ("come-mp", 3)])
def test_all_trainings_between_merges_take_the_time_of_one(
    method: str, trainings: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter(range(10**6))
    monkeypatch.setattr(
        transformers_trainer, "monotonic", lambda: float(next(now))
    )  # a second a look: one an update, or so
    model, calibration = tiny_model(), Windows(token_ids(4, 24, seed=3), "random")
    recipe = make_recipe({"method": method, "remove": 3, "heal_epochs": 100, "heal_lr": 1e-3, "heal_minutes": 1})
    chosen = method_of(recipe, model.config)
    plan = chosen.plan(recipe, MethodInputs(model, calibration, measure_scores(model, calibration)))
    healer = Healer(recipe, model, plan, WINDOWS, [].append)
    healer.before_edit(None)
    healer.after_edit(chosen.apply(model, plan, EditInputs(calibration, None, healer.after_merge)).new_layers)
    assert len(healer.results) == trainings
    assert 55 <= sum(len(healed.log.steps) for healed in healer.results) <= 62
    assert {healed.settings.minutes for healed in healer.results} == {1 / trainings}


def test_come_sp_distils_once() -> None:
    model, calibration = tiny_model(), Windows(token_ids(4, 24, seed=3), "random")
    recipe = make_recipe({"method": "come-sp", "remove": 2, "heal_epochs": 1, "heal_batch": 4, "heal_lr": 1e-3})
    method = method_of(recipe, model.config)
    plan = method.plan(recipe, MethodInputs(model, calibration, measure_scores(model, calibration)))
    healer = Healer(recipe, model, plan, WINDOWS, [].append)
    healer.before_edit(None)
    assert healer.after_merge is None
    healer.after_edit(method.apply(model, plan, EditInputs(calibration)).new_layers)
    [healed] = healer.results
    assert len(healed.log.steps) == 38 // 4


def test_an_update_begins_with_three_times_the_weights_in_memory() -> None:
    # The weights and AdamW's two moments; the gradient, to come, is the fourth.
    model = tiny_model(hidden_size=128, intermediate_size=512)
    shapes = {parameter.shape for parameter in model.parameters() if parameter.ndim > 1}
    size = sum(parameter.nbytes for parameter in model.parameters() if parameter.ndim > 1)
    held: list[float] = []

    class Looking:
        def loss(self, model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
            """The next token's, after a look at what is there."""
            if torch.is_grad_enabled():
                tensors = [each for each in gc.get_objects() if type(each) in (torch.Tensor, nn.Parameter)]
                storages = [each.untyped_storage() for each in tensors if each.shape in shapes]
                held.append(sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values()) / size)
            return NextToken().loss(model, ids)

    train_model(model, Looking(), WINDOWS, HealSettings(lr=1e-3, epochs=1, batch=16))
    assert len(held) == 2
    assert held[1] == pytest.approx(3, abs=0.2)


class Counting:
    """The next token's loss, which keeps how many windows it was asked for with gradients."""

    def __init__(self) -> None:
        self.windows: list[int] = []
        self.measured: list[int] = []

    def loss(self, model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
        """The next token's."""
        (self.windows if torch.is_grad_enabled() else self.measured).append(len(ids))
        return NextToken().loss(model, ids)


@pytest.mark.parametrize(("micro_batch", "windows"), [(1, 1), (3, 2), (4, 4), (9, 4)])
def test_micro_batches_train_as_the_whole_batch(micro_batch: int, windows: int) -> None:
    models, losses, logs = [tiny_model(), tiny_model()], [Counting(), Counting()], []
    for model, loss, at_once in zip(models, losses, (None, micro_batch), strict=True):
        settings = HealSettings(lr=1e-3, epochs=2, batch=4, micro_batch=at_once)
        logs.append(train_model(model, loss, WINDOWS, settings))
    assert {*losses[0].windows} == {4}
    assert {*losses[1].windows} == {windows}
    assert max(losses[1].measured) <= micro_batch
    assert sum(losses[0].windows) == sum(losses[1].windows)
    assert [step.loss for step in logs[0].steps] == pytest.approx([step.loss for step in logs[1].steps], rel=1e-4)
    assert logs[0].best == pytest.approx(logs[1].best, rel=1e-4)
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "opt"])  # opt has dropout in its layers
def test_layers_computed_again_give_the_same_weights(architecture: str) -> None:
    trained, runs = [], []
    for again in (False, True):
        model, counted = tiny_model(architecture), Counting()
        layer = decoder_layers(model, architecture_of(model.config))[0]
        forwards: list[bool] = []
        norm = next(module for module in layer.modules() if not [*module.children()])
        hook = norm.register_forward_pre_hook(lambda *_, seen=forwards: seen.append(torch.is_grad_enabled()))
        settings = HealSettings(lr=1e-3, epochs=1, batch=4, gradient_checkpointing=again)
        train_model(model, counted, WINDOWS, settings)
        hook.remove()
        assert "forward" not in vars(layer)
        trained.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
        runs.append(sum(forwards) / len(counted.windows))
    assert torch.equal(*trained)
    assert runs == [1, 2]  # once, and once more for the gradient


def test_mixed_precision_multiplies_in_bf16_and_keeps_weights_in_fp32() -> None:
    model, types = tiny_model(), set[torch.dtype]()
    projection = model.model.layers[0].mlp.up_proj
    hook = projection.register_forward_hook(lambda _, args, output: types.add(output.dtype))
    settings = HealSettings(lr=1e-3, epochs=2, batch=4)
    log = train_model(model, NextToken(), WINDOWS, dataclasses.replace(settings, dtype="bf16"))
    hook.remove()
    assert types == {torch.bfloat16}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert any(bool((each != each.bfloat16()).any()) for each in model.parameters())
    whole = train_model(tiny_model(), NextToken(), WINDOWS, settings)
    assert log.best < log.before
    assert log.best == pytest.approx(whole.best, rel=1e-2)
    assert log.best != whole.best


@pytest.mark.slow  # torchao compiles its update, which takes 15 s
def test_moments_in_8_bits_train_nearly_as_well_and_resume(tmp_path: Path) -> None:
    settings = HealSettings(lr=1e-3, epochs=4, batch=4, optimizer="adamw-8bit")
    model, size = tiny_model(hidden_size=128, intermediate_size=512), {"hidden_size": 128, "intermediate_size": 512}
    counting = Windows((torch.arange(40)[:, None] + torch.arange(24)) % 50 + 2, "counting")
    log = train_model(model, NextToken(), counting, settings)
    whole = train_model(tiny_model(**size), NextToken(), counting, dataclasses.replace(settings, optimizer="adamw"))
    assert log.best < log.before
    assert log.best == pytest.approx(whole.best, rel=2e-2)
    resumed = tiny_model(**size)
    part = train_model(resumed, NextToken(), counting, settings, workspace=tmp_path, stop_at=0.5)
    [*_, last] = sorted(tmp_path.glob("checkpoint-*"), key=lambda folder: int(folder.name.rpartition("-")[2]))
    moments = 2 * sum(parameter.numel() for parameter in model.parameters())
    assert (last / "optimizer.pt").stat().st_size < 1.2 * moments
    assert len(part.steps) < len(log.steps)
    assert train_model(tiny_model(**size), NextToken(), counting, settings, workspace=tmp_path) == log
