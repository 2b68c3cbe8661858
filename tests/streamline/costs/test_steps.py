"""What each step takes: the files of a step, and its memory and its time where they can be measured."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cases import make
from console import Outcome, optimum_cli
from optimum.exporters.streamline.onnx import export
from optimum.streamline.checkpoints.loading import load_on_disk, load_tokenizer, read_config
from optimum.streamline.costs import steps
from optimum.streamline.costs.machine import Machine
from optimum.streamline.costs.speed import Line, Speed, Types, measure_speed
from optimum.streamline.costs.steps import Circumstances, StepCost, step_costs
from optimum.streamline.editing.apply import apply_plan, build_replacement
from optimum.streamline.editing.candidate_corrections import fit_candidates
from optimum.streamline.editing.plan import Plan
from optimum.streamline.model_files.source import ModelSource
from optimum.streamline.models.architectures import ARCHITECTURES
from optimum.streamline.models.removed_sublayers import whole_layer
from optimum.streamline.models.skipped_sublayers import skipped_of
from optimum.streamline.pipeline import estimating
from optimum.streamline.pipeline.estimating import costs_on, estimated_costs
from optimum.streamline.pipeline.prune import prune
from optimum.streamline.recipe.parsing import make_recipe
from optimum.streamline.system.notify import silent
from optimum.streamline.text.windows import read_windows
from reference import REFERENCE, VOCABULARY
from tiny import LAYERS

pytestmark = pytest.mark.usefixtures("measured_once")
TEXT: dict[str, Any] = {"calibration": "stdlib:calibration", "samples": 4, "length": 16}
FAST = {"gemma2", "gpt2", "qwen3_moe"}
HEALED: dict[str, Any] = {"heal": "distill", "heal_data": "stdlib:calibration", "heal_tokens": 640}
SOURCE = ModelSource(str(REFERENCE))
BF16, FP32 = torch.bfloat16, torch.float32
NOTHING = Line(0, 0)
SPEED = Speed(Line(1, 2), Line(3, 4), Line(5, 6), Line(7, 8), Line(9, 10), Line(11, 12), Line(13, 14))
AROUND = Circumstances(Types(BF16, FP32, BF16), False, "cpu", 10**7, 10**8, 10**10, Path("healing"), SPEED)


def costs(around: Circumstances = AROUND, validates: bool = False, **fields: Any) -> dict[str, StepCost]:
    """The costs of a recipe on the reference model, by step."""
    recipe = make_recipe({**TEXT, **fields})
    return {cost.name: cost for cost in step_costs(recipe, read_config(SOURCE), around, validates)}


def test_the_steps_are_those_of_the_recipe() -> None:
    assert list(costs(layers="3")) == ["load", "choose", "write"]
    assert list(costs(layers="3", **HEALED)) == ["load", "choose", "heal", "write"]
    every = ["load", "choose", "heal", "write", "export", "validate"]
    assert list(costs(layers="3", **HEALED, format="onnx", validates=True)) == every
    assert list(costs(layers="3", validates=True)) == ["load", "choose", "write", "validate"]


def test_memory_of_weights() -> None:
    parameters = 3_674_240
    load = costs(layers="3")["load"]
    assert load.memory == 10**8 + 4 * parameters + 10**7  # with the file that they are read from
    same = replace(AROUND, types=Types(FP32, FP32, FP32))
    assert costs(same, layers="3")["load"].memory == 10**8 + 4 * parameters
    corrected = {"method": "shifted", "replacement": "corrected"}
    one, two = (costs(**how, remove=4, heal="none")["choose"].memory for how in (corrected, {"method": "auto"}))
    assert two - one == 4 * parameters  # `auto` holds the model twice, and tries corrections too
    assert costs(method="auto", remove=4, heal="lm")["choose"].memory < two  # it tries none then
    on_disk = costs(replace(AROUND, on_disk=True), method="sleb", remove=4)
    assert max(each.memory for each in on_disk.values()) < load.memory + 10**8


def test_the_memory_of_an_export_is_the_exporters() -> None:
    assert steps.IN_RUNTIME == export.IN_RUNTIME


def test_what_runs_on_a_gpu_takes_its_memory() -> None:
    around = replace(AROUND, scored_on="cuda")
    found = costs(around, device="cuda", layers="3", **HEALED)
    assert {name for name, cost in found.items() if cost.gpu} == {"choose", "heal", "write"}
    assert found["heal"].memory == 10**8
    apart = costs(replace(AROUND, on_disk=True), device="cuda", layers="3", **HEALED)
    assert {name for name, cost in apart.items() if cost.gpu} == {"heal"}


def test_times_follow_from_the_speed() -> None:
    found = costs(method="shortgpt", remove=4)
    assert found["load"].seconds == 1 + 16 * 2
    assert found["choose"].seconds == 4 * 16 * 6
    assert found["write"].seconds == 3 + 12 * 4
    unknown = costs(replace(AROUND, speed=None), method="shortgpt", remove=4, **HEALED)
    assert {cost.seconds for cost in unknown.values()} == {None}


def heal_seconds(**fields: Any) -> float:
    seconds = costs(layers="3", **{**HEALED, **fields})["heal"].seconds
    assert seconds is not None
    return seconds


def test_the_time_of_healing() -> None:
    # 40 windows of 16 tokens, of which 2 are held out and measured 11 times.
    update, window, original = 9 + 15 * 10, 5 + 15 * 6, 7 + 16 * 8
    once = 38 * update + 11 * 2 * window
    assert heal_seconds(heal="lm", heal_epochs=1) == once
    assert heal_seconds(heal="lm", heal_epochs=2) == once + 38 * update
    assert heal_seconds(heal_epochs=1) == once + (38 + 11 * 2) * original
    cached = {"heal_epochs": 3, "heal_cache": "full"}
    assert heal_seconds(**cached) == once + 2 * 38 * update + 40 * original
    assert heal_seconds(heal_epochs=3, heal_replace=0.2) == heal_seconds(heal_epochs=3)  # which is the default
    assert heal_seconds(heal_epochs=3) > heal_seconds(**cached) + 2 * 38 * original
    local = 40 * original + (38 * 10 + 11 * 2 * 6)  # one cut layer
    assert heal_seconds(heal="local", heal_epochs=1) == local
    assert heal_seconds(heal="local+lm", heal_epochs=1) == local + once


def test_the_disk_that_pruning_takes_is_that_of_its_result(tmp_path: Path) -> None:
    prune(
        SOURCE, make_recipe({**TEXT, "layers": "3,5"}), tmp_path / "out", overwrite=False, verbose=False, notify=silent
    )
    written = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert costs(layers="3,5")["write"].disk == pytest.approx(written, rel=0.01)


def test_too_little_room_on_the_disk_is_said_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = make_recipe({**TEXT, **HEALED, "layers": "3", "heal_epochs": 1})
    assert estimating.disk_warning(SOURCE, recipe, tmp_path / "out") == ""
    monkeypatch.setattr(estimating, "free_bytes", lambda folder: 10**6)
    notes: list[str] = []
    prune(SOURCE, recipe, tmp_path / "out", overwrite=False, verbose=False, notify=notes.append)
    assert notes[0].startswith("healing and the result take about ")
    assert notes[0].endswith(" of disk, and 1.00 MB are free there")
    exported = make_recipe({**TEXT, "layers": "3", "format": "onnx"})
    said = estimating.disk_warning(SOURCE, exported, tmp_path / "out", exports=True)
    assert said.startswith("the result and the exports take about ")
    unhealed = make_recipe({**TEXT, "layers": "3"})
    assert estimating.disk_warning(SOURCE, unhealed, tmp_path / "out").startswith("the result takes about 6.95 MB")


def test_weights_that_are_not_safetensors_are_written_again_to_stay_on_disk(tmp_path: Path) -> None:
    checkpoint = shutil.copytree(REFERENCE, tmp_path / "pickled")
    torch.save(load_file(checkpoint / "model.safetensors"), checkpoint / "pytorch_model.bin")
    (checkpoint / "model.safetensors").unlink()
    (tmp_path / "scratch").mkdir()
    load_on_disk(ModelSource(str(checkpoint)), tmp_path / "scratch")
    written = sum(each.stat().st_size for each in (tmp_path / "scratch").iterdir())
    recipe = make_recipe({**TEXT, "layers": "3", "max_memory": "400MB"})
    estimated = estimated_costs(ModelSource(str(checkpoint)), recipe).steps[0].disk
    assert estimated == pytest.approx(written, rel=0.05)
    assert estimated_costs(SOURCE, recipe).steps[0].disk == 0


def test_the_disk_that_corrections_take(tmp_path: Path) -> None:
    model, plan = load_on_disk(SOURCE, tmp_path), Plan(16, (0,), "corrected")
    text = read_windows("stdlib:calibration", load_tokenizer(SOURCE), 4, 16, 0, VOCABULARY)
    fitted = build_replacement(model, plan, text)
    apply_plan(model, plan, fitted)
    written = sum(each.stat().st_size for each in tmp_path.rglob("*") if each.is_file())
    fields = {"layers": "0", "replacement": "corrected"}
    estimate = costs(replace(AROUND, on_disk=True), **fields)["choose"].disk
    assert written < estimate < 1.1 * written
    plain, corrected = costs(layers="0")["choose"].memory, costs(**fields)["choose"].memory
    assert corrected - plain > written  # the fit needs a matrix and hidden states too


def test_the_disk_that_a_search_with_corrections_takes(tmp_path: Path) -> None:
    model = load_on_disk(SOURCE, tmp_path)
    text = read_windows("stdlib:calibration", load_tokenizer(SOURCE), 4, 16, 0, VOCABULARY)
    candidates = [whole_layer(layer) for layer in range(16)]
    fitted = [fit_candidates(model, half, candidates, frozenset()) for half in text.halves()]
    written = sum(each.stat().st_size for each in tmp_path.rglob("*") if each.is_file())
    on_disk, how = replace(AROUND, on_disk=True), {"remove": 12, "heal": "none"}
    estimate = costs(on_disk, method="sleb", replacement="corrected", **how)["choose"].disk
    del fitted  # its files go with it
    assert written < estimate < 1.2 * written
    twice = costs(on_disk, method="shifted", replacement="corrected", **how)["choose"].disk
    assert costs(on_disk, method="auto", **how)["choose"].disk == twice > 1.5 * estimate


@pytest.mark.parametrize(
    "architecture",
    [pytest.param(each, marks=() if each in FAST else pytest.mark.slow) for each in sorted(ARCHITECTURES)],
)
def test_a_few_layers_of_every_architecture_are_measured(architecture: str, tmp_path: Path) -> None:
    source = ModelSource(str(make(tmp_path / "in", architecture, num_hidden_layers=LAYERS)))
    recipe = make_recipe({**TEXT, **HEALED, "layers": "1", "heal": "lm"})
    types = Types(BF16, FP32, BF16)
    speed = measure_speed(recipe, read_config(source), load_tokenizer(source), types, False, "cpu")
    for line in (speed.load, speed.write, speed.window, speed.update, speed.token):
        assert line.of(LAYERS) > 0


def test_a_few_layers_are_measured_with_their_weights_on_disk() -> None:
    recipe = make_recipe({**TEXT, "layers": "1"})
    types = Types(FP32, FP32, FP32)
    speed = measure_speed(recipe, read_config(SOURCE), load_tokenizer(SOURCE), types, True, "cpu")
    assert speed.window.layer > 0
    assert speed.update == speed.export == NOTHING


def test_large_layers_are_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimating, "free_memory", lambda: 10**6)
    found = estimated_costs(SOURCE, make_recipe({**TEXT, "layers": "3"}))
    assert [cost.seconds for cost in found.steps] == [None] * 3
    assert found.why_no_times == "a few layers would fill the memory"


def test_a_measurement_that_fails_takes_no_plan_away(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("no room\nat all")

    monkeypatch.setattr(estimating, "measure_speed", fail)
    found = estimated_costs(SOURCE, make_recipe({**TEXT, "layers": "3"}))
    assert found.why_no_times == "measuring failed (no room)"
    assert found.steps[0].memory > 0


def test_layers_on_disk_are_measured_for_local_training() -> None:
    recipe = make_recipe({**TEXT, **HEALED, "layers": "1", "heal": "local"})
    types = Types(FP32, FP32, FP32)
    speed = measure_speed(recipe, read_config(SOURCE), load_tokenizer(SOURCE), types, True, "cpu")
    assert speed.update.of(1) > 0


def test_skipped_sublayers_are_measured_as_ordinary_ones(tmp_path: Path) -> None:
    made = tmp_path / "made"
    fields = {**TEXT, "method": "blockpruner", "remove": 1, "packed": False}
    prune(SOURCE, make_recipe(fields), made, overwrite=False, verbose=False, notify=silent)
    config = read_config(ModelSource(str(made)))
    assert skipped_of(config)
    recipe = make_recipe({**TEXT, **HEALED, "layers": "1", "heal": "lm"})
    speed = measure_speed(recipe, config, load_tokenizer(SOURCE), Types(BF16, FP32, BF16), False, "cpu")
    assert speed.update.of(1) > 0


def test_another_machine_shares_what_can_be_shared() -> None:
    fields = {**TEXT, **HEALED, "method": "shortgpt", "remove": 4}
    one, two = (costs_on(Machine("", gpus, 10**10), SOURCE, make_recipe(fields)) for gpus in (1, 2))
    assert [cost.gpu > 0 for cost in one] == [False, True, True, True]
    assert [cost.gpu > 0 for cost in two] == [False, False, True, False]
    assert two[2].gpu < one[2].gpu
    [_, _, heal, _] = costs_on(Machine("", 2, 10**10), SOURCE, make_recipe({**fields, "method": "auto"}))
    assert heal.gpu == one[2].gpu  # trial trainings need the whole model in each process
    small = costs_on(Machine("", 1, 10**7), SOURCE, make_recipe({**TEXT, "method": "sleb", "remove": 4}))
    large = costs_on(Machine("", 1, 10**10), SOURCE, make_recipe({**TEXT, "method": "sleb", "remove": 4}))
    assert small[0].memory < large[0].memory  # the weights stay on disk


def test_a_dry_run_prints_what_each_step_takes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def cli(*words: Any) -> Outcome:
        return optimum_cli(monkeypatch, capsys, "streamline", *words)

    words = ("--layers", "1", "--calibration", "stdlib", "--length", 32, "--heal", "lm", "--heal-data", "stdlib:train")
    run = ("run", "-m", make(tmp_path / "in"), *words, "--eval-data", "stdlib:eval", tmp_path / "out")
    done = cli(*run, "--dry-run")
    assert (done.code, done.err) == (0, "")
    rows = [line.split()[0] for line in done.out.splitlines() if line.strip()]
    table = rows[rows.index("step,") + 1 :]
    assert table[:5] == ["load", "choose", "heal", "write", "validate"]
    assert "layers become" in done.out
    done = cli(*run, "--dry-run", "--on", "2x T4")
    assert (done.code, done.out) == (2, "")
    assert "on '2x T4': must name GPUs and their memory" in done.err
    done = cli(*run, "--dry-run", "--on", "2x T4-1MB")
    assert (done.code, done.err) == (0, "")
    assert "heal does not fit: it takes about " in done.out
    assert "layers become" not in done.out
    done = cli(*run, "--on", "1x H100-80GB")
    assert (done.code, done.out) == (2, "")
    assert "on '1x H100-80GB': another machine can only be estimated; give dry-run too" in done.err
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = cli("prune", "-m", tmp_path / "in", *words, "--dry-run", tmp_path / "out")
    assert (done.code, done.out) == (2, "")
    assert "dry-run: 2 processes were launched; run it alone" in done.err
    assert not (tmp_path / "out").exists()
