"""Each step of `Streamliner` taken alone, on the reference model on disk and in memory."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from console import optimum_cli
from html_reader import Page
from optimum.streamline import (
    Healing,
    Plan,
    Pruning,
    Recipe,
    Report,
    Scores,
    StreamlineConfig,
    StreamlineError,
    Streamliner,
    open_runner,
)
from optimum.streamline.api.healing import healing_recipe
from optimum.streamline.checkpoints.model_in_memory import ModelInMemory
from optimum.streamline.checkpoints.provenance import changed_files
from optimum.streamline.editing import plan as editing
from optimum.streamline.model_files.artifact import Artifact
from optimum.streamline.model_files.source import ModelSource
from optimum.streamline.reporting.wording import table_rows
from reference import REFERENCE

# No text is called so: a step that reads one fails.
NO_TEXT = {"calibration": "/no/such/text", "eval_data": "/no/such/text"}
TEXT: dict[str, Any] = {"calibration": "stdlib", "samples": 4, "length": 32}
HEAL: dict[str, Any] = {"heal_data": "stdlib", "heal_tokens": 4096, "heal_epochs": 1}
JUDGE: dict[str, Any] = {"eval_data": "stdlib", "eval_samples": 4, "length": 32}


def named(layers: str = "5-8", **fields: Any) -> StreamlineConfig:
    return StreamlineConfig(**{**NO_TEXT, "layers": layers, **fields})


def on_disk() -> Streamliner:
    return Streamliner.from_pretrained(REFERENCE)


def loaded(dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(REFERENCE, dtype=dtype)
    return model


def in_memory(model: PreTrainedModel) -> Streamliner:
    return Streamliner.from_pretrained(model, tokenizer=AutoTokenizer.from_pretrained(REFERENCE))


def weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.fixture
def original() -> PreTrainedModel:
    return loaded()


@pytest.fixture(scope="module")
def scores() -> Scores:
    return on_disk().score(StreamlineConfig(**TEXT))


def test_nothing_is_loaded_before_a_step_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr("optimum.streamline.pipeline.planning.load_stock", refuse)
    streamliner = on_disk()
    assert repr(streamliner) == "Streamliner(reference_model: 16 layers)"
    assert streamliner.record is None
    assert streamliner.plan(named()).removed == (5, 6, 7, 8)
    with pytest.raises(AssertionError, match="loaded"):
        streamliner.prune(named())


def test_a_model_in_memory_scores_as_its_folder_does(scores: Scores, original: PreTrainedModel) -> None:
    original.train()
    before = weights(original)
    found = in_memory(original).score(StreamlineConfig(**TEXT))
    assert found.block_influence == scores.block_influence
    assert found.windows is not None
    assert found.windows.ids.shape == (4, 32)
    assert original.training
    assert same(weights(original), before)


def test_scores_give_a_plan_without_reading_or_scoring(scores: Scores, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("optimum.streamline.api.original_model.measure_scores", None)
    plan = on_disk().plan(StreamlineConfig(**NO_TEXT, method="shortgpt", remove=3), scores)
    least = sorted(range(16), key=lambda layer: scores.block_influence[layer])[:3]
    assert plan.removed == tuple(sorted(least))
    assert plan.scores is scores
    assert plan.chosen_on is scores.windows


def test_scores_of_another_text_or_model_are_refused(scores: Scores) -> None:
    sleb = StreamlineConfig(**{**TEXT, "seed": 7}, method="sleb", remove=1)
    with pytest.raises(StreamlineError, match="other windows than calibration 'stdlib' gives, which method sleb reads"):
        on_disk().plan(sleb, scores)
    fewer = Scores(tuple(row[:5] for row in scores.similarity[:5]), windows=scores.windows)
    with pytest.raises(StreamlineError, match="scores: are of a model of 4 layers; this one has 16"):
        on_disk().plan(StreamlineConfig(**TEXT, method="shortgpt", remove=1), fewer)


@pytest.mark.parametrize("what", [named("5-8"), Plan(16, (5, 6, 7, 8)), editing.Plan(16, (5, 6, 7, 8))])
def test_named_layers_go_without_any_text_and_from_a_copy(what: Any, original: PreTrainedModel) -> None:
    before = weights(original)
    streamliner = in_memory(original).prune(what)
    assert original.config.num_hidden_layers == 16
    assert same(weights(original), before)
    pruned = streamliner.model
    assert pruned is not original
    assert pruned.config.num_hidden_layers == len(pruned.model.layers) == 12
    assert torch.equal(pruned.model.layers[5].mlp.down_proj.weight, original.model.layers[9].mlp.down_proj.weight)
    shared = {value.data_ptr() for value in original.parameters()}
    assert not any(value.data_ptr() in shared for value in pruned.parameters())
    assert streamliner.record is not None
    assert streamliner.record["removed"] == [5, 6, 7, 8]
    assert streamliner.record["scores"] is None


@pytest.mark.parametrize("planned", [True, False])
def test_a_plan_can_correct_what_is_left(planned: bool, original: PreTrainedModel) -> None:
    streamliner = in_memory(original)
    config = StreamlineConfig(**TEXT, layers="5,6", replacement="corrected")
    record = streamliner.prune(streamliner.plan(config) if planned else config).record
    assert record is not None
    assert [layer["originals"] for layer in record["layers"] if "corrected" in layer] == [
        [each] for each in (4, *range(7, 16))
    ]
    pruned = streamliner.model.model.layers
    before = original.model.layers
    assert torch.equal(pruned[4].self_attn.o_proj.weight, before[4].self_attn.o_proj.weight)
    assert not torch.equal(pruned[4].mlp.down_proj.weight, before[4].mlp.down_proj.weight)
    assert not torch.equal(pruned[5].self_attn.o_proj.weight, before[7].self_attn.o_proj.weight)


def test_pruning_again_starts_from_the_original() -> None:
    streamliner = on_disk().prune(named("5-8")).prune(named("0"))
    assert streamliner.model.config.num_hidden_layers == 15


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (Plan(12, (5,)), "plan: is for a model of 12 layers; this one has 16"),
        (Plan(16, (5,), skipped=((2, "attention"),)), "written by hand names whole layers"),
        (Plan(16, (5,), "mlp"), "needs one block of at least 2 layers"),
        (Plan(16, ()), r"plan: removed \(\) names no layer; name at least one, such as removed=\(5,\)"),
    ],
)
def test_a_plan_that_cannot_be_carried_out_is_refused(plan: Plan, message: str) -> None:
    with pytest.raises(StreamlineError, match=message):
        on_disk().prune(plan)


@pytest.mark.parametrize("removed", [(16,), (6, 5), (5, 5), (-1,)])
def test_a_plan_of_layers_that_cannot_be_removed_is_not_made(removed: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=re.escape(f"removed {removed}: must be ")):
        Plan(16, removed)


def test_healing_trains_the_copy_and_says_so(original: PreTrainedModel) -> None:
    before = weights(original)
    streamliner = in_memory(original).prune(named("5-8"))
    pruned = weights(streamliner.model)
    streamliner.heal(StreamlineConfig(**HEAL, length=32, heal="distill"))
    assert not same(weights(streamliner.model), pruned)
    assert same(weights(original), before)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in original.parameters())
    assert streamliner.record is not None
    assert [each["stage"] for each in streamliner.record["healing"]] == ["distill"]
    assert streamliner.record["data"].keys() == {"heal"}
    assert repr(streamliner).endswith("[#####----#######], healed by distill)")


def test_a_recipe_does_what_its_config_does() -> None:
    config = named("5-8", heal="lm", heal_tokens=4096)
    from_config, from_recipe = on_disk().prune(config), on_disk().prune(config.recipe)
    assert same(weights(from_config.model), weights(from_recipe.model))
    assert from_config.record == from_recipe.record


def test_a_config_round_trips_through_a_yaml_file(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    config = StreamlineConfig(pruning=Pruning(remove="25%"), healing={"tokens": 1000}, eval_samples=8, seed=3)
    config.to_yaml_file(file)
    assert StreamlineConfig.from_yaml_file(file).recipe == config.recipe
    with pytest.raises(StreamlineError, match=r"recipe\.yaml: exists already; choose another, or give overwrite=True"):
        config.to_yaml_file(file)
    StreamlineConfig(layers="5").to_yaml_file(file, overwrite=True)
    assert StreamlineConfig.from_yaml_file(file).recipe == StreamlineConfig(layers="5").recipe
    file.write_text("pruning:\n  layer: 5\n")
    with pytest.raises(StreamlineError, match=r"^recipe .*recipe\.yaml: pruning: unknown key 'layer'"):
        StreamlineConfig.from_yaml_file(file)
    with pytest.raises(StreamlineError, match=r"recipe .*nowhere\.yaml: cannot be read"):
        StreamlineConfig.from_yaml_file(tmp_path / "nowhere.yaml")


def test_a_group_replaces_the_whole_healing_and_names_replace_single_options() -> None:
    plan, pruned_by = Plan(16, (5, 6)), named("5,6", heal="distill", heal_tokens=500, heal_epochs=2).recipe
    group = Healing(trainings="lm", tokens=200_000)
    expected = Recipe(pruning=Pruning(layers="5,6"), healing=group)
    for config in (StreamlineConfig(healing=group), expected):
        assert healing_recipe(plan, pruned_by, config).healing == group
    one_option = healing_recipe(plan, pruned_by, StreamlineConfig(heal_epochs=3)).healing
    assert one_option == replace(pruned_by.healing, epochs=3)


def test_healing_is_of_what_was_pruned() -> None:
    streamliner = on_disk()
    with pytest.raises(StreamlineError, match="heal: nothing was pruned yet; call prune first"):
        streamliner.heal(named(heal="lm"))
    streamliner.prune(named("5-8"))
    with pytest.raises(StreamlineError, match="heal 'none': nothing is to be trained"):
        streamliner.heal()
    with pytest.raises(StreamlineError, match="heal: layers '5' is not the layers that the layers were pruned by"):
        streamliner.heal(named("5", heal="lm"))
    assert streamliner.model.config.num_hidden_layers == 12


def test_the_command_and_the_steps_write_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fields = {**TEXT, **HEAL, "remove": "20%", "replacement": "mlp", "heal": "hidden-mse+distill"}
    words = [word for name, value in fields.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    command = tmp_path / "command"
    outcome = optimum_cli(monkeypatch, capsys, "streamline", "prune", "-m", REFERENCE, command, *words)
    assert outcome.code == 0, outcome.err
    config = StreamlineConfig(**fields)
    streamliner = on_disk()
    plan = streamliner.plan(config, streamliner.score(config))
    python = streamliner.prune(plan).heal().save_pretrained(tmp_path / "python")
    assert {file.name for file in python.iterdir()} == {file.name for file in command.iterdir()}
    for file in python.iterdir():
        if file.name not in ("streamline.json", "streamline.log"):
            assert file.read_bytes() == (command / file.name).read_bytes(), file.name
    records = [json.loads((folder / "streamline.json").read_text()) for folder in (python, command)]
    for record in records:
        del record["seconds"]
    assert records[0] == records[1]
    assert all(each["best_step"] > 0 for each in records[0]["healing"])  # the trainings changed weights


# The test before holds the same claim, for a trained replacement; these take half a minute each.
@pytest.mark.slow
@pytest.mark.parametrize("method", ["auto", "come-mp"])
def test_a_method_that_reads_text_gives_the_commands_weights(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fields = {**TEXT, **HEAL, "remove": 2, "method": method}
    if method == "auto":  # with distillation, the command alone makes trial trainings
        fields["heal"] = "lm"
    words = [word for name, value in fields.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    command = tmp_path / "command"
    outcome = optimum_cli(monkeypatch, capsys, "streamline", "prune", "-m", REFERENCE, command, *words)
    assert outcome.code == 0, outcome.err
    python = on_disk().prune(StreamlineConfig(**fields)).heal().save_pretrained(tmp_path / "python")
    assert (python / "model.safetensors").read_bytes() == (command / "model.safetensors").read_bytes()


def test_saving_keeps_the_model_and_the_type_of_the_original(tmp_path: Path) -> None:
    streamliner = in_memory(loaded(torch.bfloat16)).prune(named("5-8"))
    assert streamliner.model.dtype == torch.float32
    before = weights(streamliner.model)
    out = streamliner.save_pretrained(tmp_path / "out")
    assert same(weights(streamliner.model), before)
    saved = AutoModelForCausalLM.from_pretrained(out)
    assert (saved.dtype, saved.config.num_hidden_layers) == (torch.bfloat16, 12)
    assert changed_files(ModelSource(str(out))) == []
    record = json.loads((out / "streamline.json").read_text())
    assert record["source"]["model"] == "reference_model (in memory)"
    assert record["read_back"]["largest_difference"] <= record["read_back"]["allowed"]
    card = (out / "README.md").read_text()
    assert "The layers were chosen by hand.\n" in card
    with pytest.raises(StreamlineError, match="exists already"):
        streamliner.save_pretrained(out)
    streamliner.save_pretrained(out, overwrite=True)


def test_what_is_written_wrong_is_not_delivered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import optimum.streamline.pipeline.write_checkpoint as checkpoint

    def broken(model: PreTrainedModel, tokenizer: Any, dtype: Any, folder: Path) -> None:
        save(model, tokenizer, dtype, folder)
        with torch.no_grad():
            model.lm_head.weight[0, 0] += 1

    save = checkpoint.save_model
    monkeypatch.setattr(checkpoint, "save_model", broken)
    with pytest.raises(StreamlineError, match="read back, is not what was saved; nothing is delivered"):
        on_disk().prune(named("5-8")).save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("step", ["save_pretrained", "push_to_hub", "validate"])
def test_steps_that_need_a_pruned_model_say_so(step: str, tmp_path: Path) -> None:
    argument = named() if step == "validate" else str(tmp_path / "out")
    with pytest.raises(StreamlineError, match=f"{step}: nothing was pruned yet; call prune first"):
        getattr(on_disk(), step)(argument)


@pytest.mark.usefixtures("untimed")
def test_validating_in_memory_measures_both_and_names_no_temporary_folder(original: PreTrainedModel) -> None:
    streamliner = in_memory(original).prune(named("5-8"))
    config = StreamlineConfig(**JUDGE, budget={"max_ppl_ratio": 100.0})
    report = streamliner.validate(config, rounds=2)
    assert isinstance(report, Report)
    assert [(row.label, row.role, row.layers, row.path) for row in report.rows] == [
        ("original", "original", 16, ""),
        ("candidate", "candidate", 12, ""),
    ]
    assert report.rows[1].perplexity_ratio.value > 1
    assert report.verdict.passed
    assert [layer.originals[0] for layer in report.layers or ()] == [0, 1, 2, 3, 4, *range(9, 16)]
    assert Report.from_json(report.to_json()).to_json() == report.to_json()
    assert repr(report).startswith("Report(Within budget; candidate: 12 layers, ")
    nasty = replace(report, rows=(report.rows[0], replace(report.rows[1], label="<script>&")))
    page = Page(nasty._repr_html_())
    assert page.rows[0] == ["", "original", "<script>&"]
    assert len(page.rows) == 1 + len(table_rows(report))
    assert "script" not in page.tags


@pytest.mark.slow  # the command and the steps call one function, which the test before calls
def test_validating_two_folders(tmp_path: Path) -> None:
    streamliner = on_disk()
    out = streamliner.prune(named("5-8")).save_pretrained(tmp_path / "candidate")
    report = on_disk().validate(StreamlineConfig(**JUDGE), out, save_directory=tmp_path / "report", rounds=2)
    assert [row.label for row in report.rows] == ["reference_model", "candidate"]
    assert report.rows[1].path == str(out)
    assert {file.name for file in (tmp_path / "report").iterdir()} == {"report.html", "report.json", "report.md"}


@pytest.mark.onnx
def test_an_export_that_needs_text_says_which_option_gives_it(tmp_path: Path) -> None:
    with pytest.raises(
        StreamlineError, match="quantize 'int8-static' needs calibration text; give a config with calib"
    ):
        on_disk().export(tmp_path / "onnx", quantize="int8-static")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.onnx
def test_exporting_what_was_pruned_in_memory(tmp_path: Path) -> None:
    artifact = on_disk().prune(named("1-14")).export(tmp_path / "onnx")
    assert (artifact.format, artifact.dtype) == ("onnx", "fp32")
    assert max(artifact.parity.values()) < 1e-3
    assert artifact.source == "reference_model, pruned and not saved"
    assert Artifact.read(Path(artifact.path)).source == artifact.source
    assert repr(artifact).startswith("Artifact(onnx, fp32, ")
    ids = torch.arange(8)[None].numpy()
    assert open_runner(artifact.path).prefill(ids)[0].shape[-1] == 4096


def test_wrong_models_are_refused_in_one_line(original: PreTrainedModel, tmp_path: Path) -> None:
    with pytest.raises(StreamlineError, match="tokenizer is missing: LlamaForCausalLM is in memory"):
        Streamliner.from_pretrained(original)
    with pytest.raises(StreamlineError, match="model: is a Linear; give a checkpoint's folder"):
        Streamliner.from_pretrained(torch.nn.Linear(1, 1))  # type: ignore[arg-type]
    tokenizer = AutoTokenizer.from_pretrained(REFERENCE)
    with pytest.raises(StreamlineError, match="has its own; leave it out"):
        Streamliner.from_pretrained(REFERENCE, tokenizer=tokenizer)
    with pytest.raises(StreamlineError, match="the model is in memory; leave them out"):
        Streamliner.from_pretrained(original, tokenizer=tokenizer, revision="main")
    with pytest.raises(StreamlineError, match="streamline: the model is in memory"):
        in_memory(original).streamline(tmp_path / "out", named())
    with pytest.raises(StreamlineError, match="device 'cuda': the model in memory is on cpu"):
        in_memory(original).prune(named(device="cuda"))


def test_what_only_the_whole_chain_does_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(StreamlineError, match="the steps work in one process"):
        on_disk().prune(named())


def test_the_files_of_a_model_in_memory_are_written_once_and_go_with_it(original: PreTrainedModel) -> None:
    source = in_memory(original)._source
    assert isinstance(source, ModelInMemory)
    folder = source.folder
    assert folder == source.folder
    assert same(weights(AutoModelForCausalLM.from_pretrained(folder)), weights(original))
    del source
    assert not folder.exists()


@pytest.mark.parametrize("method", ["shifted", pytest.param("auto", marks=pytest.mark.slow)])  # ten seconds
def test_a_plan_can_be_made_of_the_scores_of_its_own_config(method: str) -> None:
    config, model = StreamlineConfig(**TEXT, method=method, remove=1, heal="none"), on_disk()
    plan = model.plan(config, model.score(config))
    assert plan == on_disk().plan(config)
