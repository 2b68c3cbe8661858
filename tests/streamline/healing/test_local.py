"""Local training: which layers it trains, on which hidden states of the original, and that nothing else changes."""

from __future__ import annotations

import copy
import errno
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from console import command
from optimum.streamline.editing.apply import EditInputs, apply_plan
from optimum.streamline.editing.plan import Merge, Plan, depths_of, merge_plan, packed_plan
from optimum.streamline.errors import StreamlineError
from optimum.streamline.healing import stages
from optimum.streamline.healing.local import cut_layers, layer_errors
from optimum.streamline.healing.losses import NextToken
from optimum.streamline.healing.stages import Healer
from optimum.streamline.methods.come import CoMe
from optimum.streamline.model_files.source import ModelSource
from optimum.streamline.models.architectures import architecture_of, can_pack, decoder_layers
from optimum.streamline.models.skipped_sublayers import mark_skipped, skipped_sublayers_dropped
from optimum.streamline.pipeline.prune import change, prepare
from optimum.streamline.recipe.parsing import make_recipe
from optimum.streamline.system import disk
from optimum.streamline.text.windows import Windows, read_windows
from reference import HEALED, REFERENCE
from tiny import LAYERS, every, tiny_model, token_ids

# One is held out. It is trained on too: random layers learn nothing that holds elsewhere.
WINDOWS = Windows(token_ids(1, 24).repeat(20, 1), "random")
IDS = token_ids(3, 24, seed=1)
RECIPE = make_recipe({"layers": "1", "heal": "local", "heal_epochs": 2, "heal_lr": 2e-3})
# The attention of 1 with the MLP of 3, and layer 0 gone: a window over the tokens and none, where there are both.
PACKED = packed_plan(LAYERS, [(0, "attention"), (0, "mlp"), (1, "mlp"), (2, "attention"), (2, "mlp"), (3, "attention")])
THINNED = Plan(LAYERS, (0,), skipped=((2, "attention"), (3, "mlp")))


def edited(model: PreTrainedModel, plan: Plan) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The model edited by a plan, and the original."""
    original = copy.deepcopy(model)
    apply_plan(model, plan, None)
    return model, original


def marked(skipped: dict[int, list[str]]) -> PreTrainedConfig:
    config = tiny_model().config
    mark_skipped(config, skipped)
    return config


@pytest.mark.parametrize(
    ("plan", "cut"),
    [
        (Plan(LAYERS, (1, 3)), [(0, (0, 1)), (1, (2, 3))]),
        (Plan(LAYERS, (2, 3, 4)), [(1, (1, 2, 3, 4))]),
        (Plan(LAYERS, (0, 1)), [(0, (0, 1, 2))]),  # from the embeddings
        (packed_plan(LAYERS, [(1, "mlp"), (2, "attention")]), [(1, (1, 2))]),
        (packed_plan(LAYERS, [(1, "attention"), (1, "mlp")]), [(0, (0, 1))]),
        (PACKED, [(0, (0, 1, 2, 3))]),
        (packed_plan(LAYERS, [(0, "mlp"), (1, "attention"), (2, "mlp")]), [(0, (0, 1)), (1, (2,))]),
        (THINNED, [(0, (0, 1)), (1, (2,)), (2, (3,))]),
        (merge_plan(LAYERS, [Merge(1, 0.5, 0.5)]), [(1, (1, 2))]),
    ],
)
def test_a_layer_that_stands_for_more_than_it_has_is_trained(plan: Plan, cut: list[tuple[Any, ...]]) -> None:
    after = marked({index: ["mlp"] for index, layer in enumerate(plan.new_layers) if layer.kind == "thinned"})
    found = cut_layers(plan.new_layers, marked({}), after)
    assert [(each.layer, each.block) for each in found] == cut
    assert [each.block[-1] + 1 for each in found] == [plan.depths[each.layer] for each in found]


def test_what_the_original_skipped_is_not_lost() -> None:
    before = marked({1: ["mlp"], 2: ["attention"], 3: ["attention", "mlp"]})
    plan = packed_plan(LAYERS, [(1, "mlp"), (2, "attention"), (3, "attention"), (3, "mlp")])
    assert len(plan.new_layers) == 3
    assert cut_layers(plan.new_layers, before, marked({})) == ()
    assert cut_layers(Plan(LAYERS, ()).new_layers, before, before) == ()


def test_a_plan_that_cuts_nothing_is_refused() -> None:
    plan = Plan(LAYERS, ())
    healer = Healer(RECIPE, tiny_model(), plan, WINDOWS, [].append)
    healer.before_edit(None)
    with pytest.raises(StreamlineError, match="^heal 'local': the plan leaves every layer as it was, and local trains"):
        healer.after_edit(plan.new_layers)


@pytest.mark.parametrize("architecture", every())
def test_the_error_is_of_the_layer_in_its_place_given_the_originals_state(architecture: str, tmp_path: Path) -> None:
    # Here the layer runs in the edited model, with its masks and positions, and only its input is put in.
    model = tiny_model(architecture)
    model, original = edited(model, PACKED if can_pack(model.config) else THINNED)
    plan = PACKED if can_pack(model.config) else THINNED
    states: list[torch.Tensor] = []
    row = architecture_of(model.config)
    with torch.no_grad():
        layers = decoder_layers(original, row)
        hooks = [layer.register_forward_pre_hook(lambda _, args: states.append(args[0])) for layer in layers]
        hooks.append(layers[-1].register_forward_hook(lambda _, args, out: states.append(first_of(out))))
        original(IDS)
        [hook.remove() for hook in hooks]
        assert len(states) == LAYERS + 1
    found = cut_layers(plan.new_layers, original.config, model.config)
    for cut, layer_error in zip(found, layer_errors(original, found, IDS, tmp_path), strict=True):
        given, wanted = states[cut.block[0]], states[depths_of(plan.new_layers, LAYERS)[cut.layer]]
        outputs: list[torch.Tensor] = []
        layer = decoder_layers(model, row)[cut.layer]
        hooks = [
            layer.register_forward_pre_hook(lambda _, args, given=given: (given, *args[1:])),
            layer.register_forward_hook(lambda _, args, out, outputs=outputs: outputs.append(first_of(out))),
        ]
        with torch.no_grad():
            model(IDS)
            [hook.remove() for hook in hooks]
            error = layer_error.loss(model, IDS)
        difference = (outputs[0] - wanted).double().flatten(0, 1).square().sum(1)
        expected = (difference / wanted.double().flatten(0, 1).square().sum(1)).mean()
        assert float(error) == pytest.approx(float(expected), rel=1e-4)
        assert float(error) > 1e-4


def first_of(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


@pytest.mark.parametrize("plan", [PACKED, THINNED], ids=["packed", "thinned"])
def test_each_cut_layer_is_trained_and_nothing_else(plan: Plan, tmp_path: Path) -> None:
    model = tiny_model()
    healer = Healer(RECIPE, model, plan, WINDOWS, [].append)
    healer.before_edit(None)
    apply_plan(model, plan, None)
    original, before = tiny_model(), copy.deepcopy(model)
    cut = cut_layers(plan.new_layers, original.config, model.config)
    healer.after_edit(plan.new_layers)
    assert [(each.stage, each.scope, each.layer) for each in healer.results] == [
        ("local", "layer", each.layer) for each in cut
    ]
    with torch.no_grad(), skipped_sublayers_dropped(model), skipped_sublayers_dropped(before):
        errors = layer_errors(original, cut, WINDOWS.ids, tmp_path)
        for error, healed in zip(errors, healer.results, strict=True):
            assert healed.log.before == pytest.approx(float(error.loss(before, WINDOWS.ids[-1:])), rel=1e-5)
            assert healed.log.best == pytest.approx(float(error.loss(model, WINDOWS.ids[-1:])), rel=1e-5)
            assert healed.log.best < healed.log.before
    prefixes = tuple(f"model.layers.{each.layer}." for each in cut)
    old = before.state_dict()
    for name, value in model.state_dict().items():
        zeroed = name.endswith("proj.weight") and not old[name].any()
        assert torch.equal(value, old[name]) or (name.startswith(prefixes) and not zeroed), name
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_states_that_a_killed_run_left_are_overwritten_and_gone_in_the_end(tmp_path: Path) -> None:
    left = tmp_path / "states-0"
    left.mkdir()
    (left / "one.npy").write_bytes(b"half written")
    model = tiny_model()
    healer = Healer(RECIPE, model, THINNED, WINDOWS, [].append, tmp_path)
    healer.before_edit(None)
    apply_plan(model, THINNED, None)
    healer.after_edit(THINNED.new_layers)
    assert len(healer.results) == 3
    assert not left.exists()


def test_a_disk_without_room_for_the_states_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def healed() -> None:
        model = tiny_model()
        healer = Healer(RECIPE, model, THINNED, WINDOWS, [].append)
        healer.before_edit(None)
        apply_plan(model, THINNED, None)
        healer.after_edit(THINNED.new_layers)

    wanted = (
        r"^heal local: the original's hidden states take 0\.0 GB in .*No space left on device\); make room, or give"
    )
    with monkeypatch.context() as patch, pytest.raises(StreamlineError, match=wanted):
        patch.setattr(disk.os, "posix_fallocate", full)
        healed()
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(StreamlineError, match=wanted):
        healed()


def test_a_merged_layer_learns_the_output_of_both() -> None:
    plan, model = merge_plan(LAYERS, [Merge(1, 0.5, 0.5)]), tiny_model()
    healer = Healer(RECIPE, model, plan, WINDOWS, [].append)
    healer.before_edit(None)
    CoMe().apply(model, plan, EditInputs(WINDOWS))
    healer.after_edit(plan.new_layers)
    [healed] = healer.results
    assert healed.layer == 1
    assert healed.log.best < healed.log.before


def test_the_layers_share_one_limit_of_time() -> None:
    model = tiny_model()
    healer = Healer(RECIPE.with_options(heal_minutes=6.0), model, THINNED, WINDOWS, [].append)
    healer.before_edit(None)
    apply_plan(model, THINNED, None)
    healer.after_edit(THINNED.new_layers)
    assert [healed.settings.minutes for healed in healer.results] == [2.0] * 3


def test_what_was_stopped_between_two_layers_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def healed(workspace: Path | None) -> tuple[PreTrainedModel, Healer]:
        model = tiny_model()
        healer = Healer(RECIPE, model, THINNED, WINDOWS, [].append, workspace)
        healer.before_edit(None)
        apply_plan(model, THINNED, None)
        healer.after_edit(THINNED.new_layers)
        return model, healer

    whole, at_once = healed(None)
    train, trained = stages.train_model, list[str]()

    def stopping(*args: Any, title: str, **rest: Any) -> Any:
        if len(trained) == 2:
            raise KeyboardInterrupt
        trained.append(title)
        return train(*args, title=title, **rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(stages, "train_model", stopping)
        healed(tmp_path)
    assert trained == ["training layer 0", "training layer 1"]
    resumed, in_two = healed(tmp_path)
    assert in_two.results == at_once.results
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in resumed.state_dict().items())


def test_a_command_trains_layers_then_the_model_and_says_so(tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = "streamline prune --layers 5,9-10 --heal local+distill --heal-tokens 1024 --heal-lr 1e-3 --samples 4"
    text = ("--length", 32, "--heal-epochs", 2, "--heal-batch", 4, "--calibration", "stdlib")
    done = command(*words.split()[1:], "-m", REFERENCE, *HEALED, *text, out)
    assert (done.code, done.err) == (0, "")
    assert "training layers 4, 7 (local) on 30 windows, 2 passes\n" in done.out
    trained = json.loads((out / "streamline.json").read_text())["healing"]
    assert [(each["stage"], each["scope"], each.get("layer")) for each in trained] == [
        ("local", "layer", 4),
        ("local", "layer", 7),
        ("distill", "model", None),
    ]
    assert all(each["best"] < each["before"] for each in trained)
    card = (out / "README.md").read_text()
    before, after = (sum(each[key] for each in trained[:2]) / 2 for key in ("before", "best"))
    assert (
        "Of this model's layers, 4, 7 were trained one by one on 30 of 32 windows of 32 tokens of `stdlib:train`, "
        f"each up to 2 times: held-out hidden-state error, their mean, {before:.4g} before, {after:.4g} after.\n"
    ) in card
    assert "each up to 2 times, after the first time with 20% of the tokens replaced by draws of the original: " in card
    assert [each["settings"]["replaced"] for each in trained] == [0, 0, 0.2]
    assert AutoModelForCausalLM.from_pretrained(out).config.num_hidden_layers == 13


@pytest.mark.slow
def test_alone_it_recovers_a_third_of_the_loss_at_least() -> None:
    text = {"calibration": "stdlib:calibration", "heal_data": "stdlib:calibration", "samples": 2, "length": 128}
    healing = {"heal": "local", "heal_tokens": 16_000, "heal_epochs": 2}
    source, losses = ModelSource(REFERENCE), list[float]()
    for fields in ({"heal": "none"}, healing):
        prepared = prepare(source, make_recipe({"layers": "1,3,5,12", **text, **fields}), [].append)
        vocabulary = prepared.model.config.vocab_size
        windows = read_windows("stdlib:eval", prepared.tokenizer, 32, 128, 0, vocabulary)
        models = [copy.deepcopy(prepared.model), prepared.model]
        change(prepared, [].append)
        losses += [mean_loss(model, windows.ids) for model in models]
    dense, pruned, _, healed = losses
    assert healed - dense < 2 / 3 * (pruned - dense)


@torch.no_grad()
def mean_loss(model: PreTrainedModel, ids: torch.Tensor) -> float:
    return float(NextToken().loss(model, ids))
