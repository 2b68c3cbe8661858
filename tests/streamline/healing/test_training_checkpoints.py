"""A stopped training resumes, and ends with the same weights bit for bit. The killed command does too."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from console import command, optimum_cli
from healing_inputs import make_inputs
from optimum.streamline.editing.plan import Plan
from optimum.streamline.errors import StreamlineError
from optimum.streamline.healing import transformers_trainer
from optimum.streamline.healing.losses import NextToken, NotFiniteError
from optimum.streamline.healing.settings import HealLog, HealSettings, best_row
from optimum.streamline.healing.trainable_parts import train_model
from optimum.streamline.healing.training_checkpoints import healing_workspace, open_workspace, plan_folder
from optimum.streamline.model_files.source import ModelSource
from optimum.streamline.pipeline.prune import change, prepare
from optimum.streamline.recipe.parsing import make_recipe
from optimum.streamline.system.atomic_output import locked_output
from optimum.streamline.text.windows import Windows
from tiny import tiny_model

COUNTING = Windows((torch.arange(40)[:, None] + torch.arange(24)) % 50 + 2, "counting")
SETTINGS = HealSettings(lr=1e-3, epochs=5)  # 190 windows: 23 updates, a checkpoint every second or third


class Stop(Exception):
    """The power went off."""


class Stopping:
    """The goal, for so many batches."""

    def __init__(self, batches: int) -> None:
        self.left = batches

    def loss(self, model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
        """The next token's, or the end."""
        self.left -= 1
        if self.left < 0:
            raise Stop
        return NextToken().loss(model, ids)


def flat(model: PreTrainedModel) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def checkpoints(workspace: Path) -> list[Path]:
    return sorted(workspace.glob("checkpoint-*"), key=lambda folder: int(folder.name.partition("-")[2]))


@pytest.fixture(scope="module", params=[None, 2])
def whole(request: pytest.FixtureRequest) -> tuple[HealSettings, torch.Tensor, HealLog]:
    """A training that nothing stopped: how, to what weights, and its log."""
    settings = HealSettings(lr=1e-3, epochs=5, lora_rank=request.param)
    model = tiny_model()
    log = train_model(model, NextToken(), COUNTING, settings)
    return settings, flat(model), log


@pytest.mark.parametrize("broken", [False, True])
def test_a_stopped_training_ends_where_one_that_was_not_does(
    whole: tuple[HealSettings, torch.Tensor, HealLog], broken: bool, tmp_path: Path
) -> None:
    settings, weights, log = whole
    with pytest.raises(Stop):
        train_model(tiny_model(), Stopping(21), COUNTING, settings, workspace=tmp_path)
    found = checkpoints(tmp_path)
    assert len(found) == 2
    if broken:  # the last one was not yet whole
        (found[-1] / "whole").unlink()
        (found[-1] / "optimizer.pt").write_bytes(b"half")
    model = tiny_model()
    assert train_model(model, NextToken(), COUNTING, settings, workspace=tmp_path) == log
    assert torch.equal(flat(model), weights)


def test_a_training_goes_on_from_a_share_of_it(
    whole: tuple[HealSettings, torch.Tensor, HealLog], tmp_path: Path
) -> None:
    settings, weights, log = whole
    model, loaded = tiny_model(), tiny_model()
    part = train_model(model, NextToken(), COUNTING, settings, workspace=tmp_path, stop_at=0.4)
    assert part.steps == log.steps[: len(part.steps)]
    assert len(part.steps) == math.ceil(0.4 * len(log.steps))
    assert train_model(loaded, Stopping(0), COUNTING, settings, workspace=tmp_path, stop_at=0.4) == part
    assert torch.equal(flat(model), flat(loaded))
    assert not torch.equal(flat(model), flat(tiny_model()))
    model = tiny_model()
    assert train_model(model, NextToken(), COUNTING, settings, workspace=tmp_path) == log
    assert torch.equal(flat(model), weights)


def test_a_stopped_training_keeps_to_the_time_it_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers_trainer, "monotonic", itertools.count().__next__)  # a second a look
    settings = dataclasses.replace(SETTINGS, minutes=0.3)
    log = train_model(tiny_model(), NextToken(), COUNTING, settings)
    assert len(log.steps) == 18  # of 23
    with pytest.raises(Stop):
        train_model(tiny_model(), Stopping(15), COUNTING, settings, workspace=tmp_path)
    assert train_model(tiny_model(), NextToken(), COUNTING, settings, workspace=tmp_path) == log


def test_a_checkpoint_holds_what_is_trained_and_nothing_else(tmp_path: Path) -> None:
    model = tiny_model()
    train_model(model, NextToken(), COUNTING, SETTINGS, part=model.model.layers[1], workspace=tmp_path)
    held = load_file(checkpoints(tmp_path)[-1] / "model.safetensors")
    [best] = tmp_path.glob("best-*")
    for tensors in (held, load_file(best)):
        assert sum(value.numel() for value in tensors.values()) == sum(
            parameter.numel() for parameter in model.model.layers[1].parameters()
        )


def test_a_training_stopped_before_a_checkpoint_is_complete_has_the_best_weights_of_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep = transformers_trainer.TrainedWeights.keep

    def stopped(self: transformers_trainer.TrainedWeights, step: int) -> None:
        keep(self, step)
        if step > 10:
            raise Stop

    monkeypatch.setattr(transformers_trainer.TrainedWeights, "keep", stopped)
    with pytest.raises(Stop):
        train_model(tiny_model(), NextToken(), COUNTING, SETTINGS, workspace=tmp_path)
    rows = json.loads((checkpoints(tmp_path)[-1] / "trainer_state.json").read_text())["log_history"]
    steps = {int(file.stem.partition("-")[2]) for file in tmp_path.glob("best-*")}
    assert steps == {best_row(rows)["step"], max(steps)}
    assert max(steps) > 10


@pytest.mark.parametrize("saves", [True, False])
def test_one_file_of_best_weights_is_left(saves: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    restore, left = transformers_trainer.TrainedWeights.restore, list[int]()

    def looking(self: transformers_trainer.TrainedWeights, step: int) -> None:
        left.append(len([*self._folder.glob("best-*")]))
        restore(self, step)

    monkeypatch.setattr(transformers_trainer.TrainedWeights, "restore", looking)
    train_model(tiny_model(), NextToken(), COUNTING, SETTINGS, workspace=tmp_path if saves else None)
    assert left == [1]


def test_a_training_that_ended_is_not_done_again_and_keeps_its_result_alone(tmp_path: Path) -> None:
    first, second = tiny_model(), tiny_model()
    log = train_model(first, NextToken(), COUNTING, SETTINGS, workspace=tmp_path)
    assert len(checkpoints(tmp_path)) == 1
    weights = sum(parameter.numel() * parameter.element_size() for parameter in first.parameters())
    assert sum(file.stat().st_size for file in tmp_path.rglob("*.*")) < 2.2 * weights  # the last, and the best
    assert train_model(second, Stopping(0), COUNTING, SETTINGS, workspace=tmp_path) == log
    assert torch.equal(flat(first), flat(second))


def saved(workspace: Path) -> Path:
    checkpoint = plan_folder(workspace, Plan(3, (1,))) / "0" / "checkpoint-7"
    checkpoint.mkdir(parents=True)
    (checkpoint / "whole").touch()
    return checkpoint


def test_a_workspace_is_for_one_model_and_text(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with healing_workspace(out, "abcdefabcdef0123") as workspace:
        assert workspace == tmp_path / ".out.healing-abcdefabcdef"
        assert not open_workspace(workspace, {"text": "a"})
        checkpoint = saved(workspace)
        assert open_workspace(workspace, {"text": "a"})
        assert checkpoint.is_dir()
        assert not open_workspace(workspace, {"text": "b"})
        assert not checkpoint.exists()
    assert not workspace.exists()


@pytest.mark.parametrize(
    ("error", "stays"),
    [(KeyboardInterrupt(), True), (StreamlineError("the disk is full"), True), (NotFiniteError("try less"), False)],
)
def test_what_was_saved_outlives_all_but_a_training_that_came_to_nothing(
    error: BaseException, stays: bool, tmp_path: Path
) -> None:
    for has_saved in (False, True):
        with pytest.raises(type(error)) as raised, healing_workspace(tmp_path / "out", "abc") as workspace:
            open_workspace(workspace, {"text": "a"})
            if has_saved:
                saved(workspace)
            raise error
        assert workspace.exists() == (stays and has_saved)
        note = f"checkpoints kept in {workspace}: the same command resumes from them"
        assert (note in getattr(raised.value, "__notes__", ())) == (stays and has_saved)
        shutil.rmtree(workspace, ignore_errors=True)


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A command that takes a while to heal, less its output."""
    words = f"streamline prune {make_inputs(tmp_path_factory.mktemp('inputs'))} --remove 2 --replacement mlp"
    return f"{words} --heal hidden-mse+distill --samples 4 --heal-tokens 2560 --length 32".split()


def run(launcher: str, words: list[str], out: Path) -> subprocess.Popen[str]:
    arguments = [sys.executable, "-m", *launcher.split(), *words, str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}  # sums in the order they have here
    environment |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


@pytest.fixture(scope="module")
def alone(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command makes when nothing stops it."""
    out = tmp_path_factory.mktemp("alone") / "out"
    done = command(*words[1:], out)
    assert (done.code, done.err) == (0, "")
    assert [folder.name for folder in out.parent.iterdir()] == ["out"]
    return out


def healing(out: Path) -> list[dict[str, object]]:
    record: list[dict[str, object]] = json.loads((out / "streamline.json").read_text())["healing"]
    return record


def waiting(seconds: float) -> Iterator[None]:
    for _ in range(int(seconds * 100)):
        yield
        time.sleep(0.01)


@pytest.mark.slow  # in this process, `test_a_stopped_training_ends_where_one_that_was_not_does` is fast
def test_a_killed_command_goes_on(words: list[str], alone: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with run("optimum.commands.optimum_cli", words, out) as process:
        for _ in waiting(60):  # for the second training to have saved
            if process.poll() is not None or any(tmp_path.glob(".out.healing-*/*/1/checkpoint-*/whole")):
                break
        process.kill()
        process.communicate()
    assert process.returncode == -9
    assert not out.exists()
    [workspace] = tmp_path.glob(".out.healing-*")
    again = command(*words[1:], out)
    assert (again.code, again.err) == (0, "")
    assert f"continuing from the training checkpoints in {workspace}" in again.out
    assert [folder.name for folder in tmp_path.iterdir()] == ["out"]
    assert (out / "model.safetensors").read_bytes() == (alone / "model.safetensors").read_bytes()
    assert healing(out) == healing(alone)


SHORT = ["--heal-tokens", "384"]  # of 12 windows one is held out


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (StreamlineError("the disk is full"), 2, "error: the disk is full\n"),
    ],
)
def test_what_ends_a_command_says_what_it_leaves(
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    code: int,
    line: str,
) -> None:
    def fail(*_: object) -> None:
        raise error

    with monkeypatch.context() as patched:
        patched.setattr("optimum.streamline.pipeline.write_checkpoint.save_model", fail)
        stopped = optimum_cli(patched, capsys, *words, *SHORT, tmp_path / "out")
    [workspace] = tmp_path.iterdir()
    assert workspace.name.startswith(".out.healing-")
    assert stopped.code == code
    assert stopped.err == f"{line}checkpoints kept in {workspace}: the same command resumes from them\n"
    again = optimum_cli(monkeypatch, capsys, *words, *SHORT, tmp_path / "out")
    assert (again.code, again.err) == (0, "")
    assert f"continuing from the training checkpoints in {workspace}" in again.out
    assert [folder.name for folder in tmp_path.iterdir()] == ["out"]


def test_checkpoints_of_another_plan_are_not_gone_on_from(words: list[str], tmp_path: Path) -> None:
    # The same recipe may choose otherwise where the scores are nearly equal, on another machine.
    text = words[words.index("--heal-data") + 1]
    fields = {"layers": "1", "heal": "lm", "heal_tokens": 384, "heal_epochs": 1, "samples": 4, "length": 32}
    recipe = make_recipe({**fields, "calibration": text, "heal_data": text})
    told: list[bool] = []
    for layer in (1, 1, 2):
        prepared = prepare(ModelSource(words[words.index("-m") + 1]), recipe, lambda _: None)
        prepared.plan = Plan(prepared.plan.total, (layer,))
        said: list[str] = []
        change(prepared, said.append, tmp_path / "workspace")
        told.append(any("continuing from the training checkpoints" in line for line in said))
    assert told == [False, True, False]


TORCHRUN = "torch.distributed.run --nproc_per_node 2"
ACCELERATE = (
    "accelerate.commands.launch --cpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no"
)


@pytest.mark.parametrize(
    "launcher",
    [
        TORCHRUN,
        pytest.param(
            f"{ACCELERATE} --mpirun_hostfile HOSTS",
            marks=[
                pytest.mark.slow,
                pytest.mark.skipif(shutil.which("mpirun") is None, reason="no MPI on this machine"),
            ],
        ),
    ],
    ids=["torchrun", "accelerate"],
)
def test_two_processes_train_as_one(launcher: str, words: list[str], alone: Path, tmp_path: Path) -> None:
    out, hosts = tmp_path / "made" / "out", tmp_path / "hosts"
    hosts.write_text("localhost slots=2\n")
    launcher = launcher.replace("HOSTS", str(hosts))
    with run(f"{launcher} -m optimum.commands.optimum_cli", words, out) as process:
        said, err = process.communicate()
    assert (process.returncode, err) == (0, "")
    assert said.count("loading ") == said.count("saved ") == 1
    assert [folder.name for folder in out.parent.iterdir()] == ["out"]
    for ours, theirs in zip(healing(out), healing(alone), strict=True):
        losses = [[step["loss"] for step in healed["steps"]] for healed in (ours, theirs)]
        # Sums in another order can draw another token for a version of the text; its loss differs in the fourth digit.
        assert losses[0] == pytest.approx(losses[1], rel=1e-3)
        assert ours["best"] == pytest.approx(theirs["best"], rel=1e-3)
        assert ours["settings"] == theirs["settings"]


@pytest.mark.slow
def test_two_processes_judge_by_one_held_out_window(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    both, one = tmp_path / "both", tmp_path / "one"
    with run(f"{TORCHRUN} -m optimum.commands.optimum_cli", [*words, *SHORT], both) as process:
        _, err = process.communicate()
    assert (process.returncode, err) == (0, "")
    assert optimum_cli(monkeypatch, capsys, *words, *SHORT, one).code == 0
    for ours, theirs in zip(healing(both), healing(one), strict=True):
        assert ours["before"] == pytest.approx(theirs["before"], rel=1e-4)
        assert ours["best"] == pytest.approx(theirs["best"], rel=1e-4)


# Two processes that would each take out another layer, as they may where the scores are nearly equal.
DIVIDED = """
import sys
from pathlib import Path
from optimum.streamline.model_files.source import ModelSource
from optimum.streamline.errors import StreamlineError
from optimum.streamline.system.distributed import is_main
from optimum.streamline.pipeline.prune import prune
from optimum.streamline.recipe.parsing import make_recipe

model, text, folder = sys.argv[1:]
recipe = make_recipe({"layers": "1" if is_main() else "2", "samples": 2, "length": 32, "calibration": text})
for name in ("claimed", "free"):
    try:
        options = {"overwrite": False, "verbose": False, "notify": lambda _: None}
        end = prune(ModelSource(model), recipe, Path(folder) / name, **options).plan.removed
    except StreamlineError as error:
        end = error
    (Path(folder) / f"{name}-{1 - is_main()}").write_text(str(end))
"""


@pytest.mark.slow
def test_two_processes_are_refused_as_one_and_plan_as_one(words: list[str], tmp_path: Path) -> None:
    script = tmp_path / "divided.py"
    script.write_text(DIVIDED)
    inputs = [words[words.index(flag) + 1] for flag in ("-m", "--calibration")]
    with locked_output(tmp_path / "claimed", ()), run(f"{TORCHRUN} {script}", inputs, tmp_path) as process:
        _, err = process.communicate()
    assert process.returncode == 0, err  # other libraries may say what they like to a script
    refusals = [(tmp_path / f"claimed-{rank}").read_text() for rank in (0, 1)]
    assert refusals[0] == refusals[1]
    assert "another run is writing it" in refusals[0]
    assert [(tmp_path / f"free-{rank}").read_text() for rank in (0, 1)] == ["(1,)", "(1,)"]


@pytest.mark.slow
def test_what_two_processes_began_one_ends(words: list[str], alone: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with run(f"{TORCHRUN} -m optimum.commands.optimum_cli", words, out) as process:
        for _ in waiting(60):  # for the second training to have saved
            if process.poll() is not None or any(tmp_path.glob(".out.healing-*/*/1/checkpoint-*/whole")):
                break
        process.terminate()
        process.communicate()
    assert process.returncode != 0
    assert not out.exists()
    with run("optimum.commands.optimum_cli", words, out) as process:
        said, err = process.communicate()
    assert (process.returncode, err) == (0, "")
    assert "continuing from the training checkpoints in " in said
    assert [folder.name for folder in tmp_path.iterdir()] == ["out"]
    for ours, theirs in zip(healing(out), healing(alone), strict=True):
        losses = [[step["loss"] for step in healed["steps"]] for healed in (ours, theirs)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)
