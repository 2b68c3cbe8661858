"""Processes that share the weights of a model each hold a part of every tensor, and train as one process does."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from console import command
from healing_inputs import make_inputs
from optimum.streamline.costs.healing_memory import healing_memory
from optimum.streamline.errors import StreamlineError
from optimum.streamline.model_files.source import ModelSource
from optimum.streamline.models.architectures import ARCHITECTURES
from optimum.streamline.pipeline.larger_than_memory import stays_on_disk, why_in_memory
from optimum.streamline.recipe.parsing import make_recipe
from optimum.streamline.system import distributed
from optimum.streamline.system.distributed import Sharding
from reference import REFERENCE
from tiny import tiny_model, token_ids

FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
# In two processes: run each model whole and shared, change the shared one, and write it back.
SHARED = """
import sys
from pathlib import Path
import torch
from optimum.streamline.model_files.source import ModelSource
from optimum.streamline.models.offloaded_weights import read_parameter
from optimum.streamline.models.sharded_weights import own_part, sharded_copy, write_back
from optimum.streamline.costs.healing_memory import healing_memory
from optimum.streamline.checkpoints.loading import load_on_disk
from optimum.streamline.system.distributed import is_main, join_processes

folder, *names = sys.argv[1:]
join_processes("cpu")
ids = torch.load(f"{folder}/ids.pt")
for name in names:
    scratch = Path(f"{folder}/{name}-scratch{is_main()}")
    scratch.mkdir()
    model = load_on_disk(ModelSource(f"{folder}/{name}"), scratch).eval()
    expected = model(ids, use_cache=False).logits
    shared = sharded_copy(model, "cpu", torch.float32)
    with torch.no_grad():
        assert torch.equal(shared(ids, use_cache=False).logits, expected), name
    own, whole = (sum(f(each).numel() for each in shared.parameters()) for f in (own_part, lambda each: each))
    assert 0.45 * whole < own < 0.55 * whole, (name, own, whole)
    with torch.no_grad():
        for parameter in shared.parameters():
            own_part(parameter).mul_(0.5)
        halved = shared(ids, use_cache=False).logits
    assert not torch.equal(halved, expected), name
    write_back(shared, model)
    if is_main():
        assert torch.equal(model(ids, use_cache=False).logits, halved), name
        for key, value in model.named_parameters():
            read_parameter(model, key)
"""
# Run the command, with as few logits at a time as the environment says.
COMMAND = """
import os
from optimum.commands.optimum_cli import main
if "LOGITS" in os.environ:
    from optimum.streamline.healing import losses
    losses.LOGITS = int(os.environ["LOGITS"])
main()
"""
# Run the command, and write the peak memory of this process in bytes.
PEAK = """
import atexit, os, resource, sys
from pathlib import Path
from optimum.commands.optimum_cli import main

def note():
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    Path(f"{sys.argv[-1]}.peak-{os.environ['RANK']}").write_text(str(peak))

atexit.register(note)
main()
"""


def run(words: str, *arguments: object, **variables: str) -> tuple[int, str, str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", *words.split()]
    environment = {**os.environ, **FSDP, "OMP_NUM_THREADS": "1", **variables}
    words_of_all = [*launcher, *map(str, arguments)]
    done = subprocess.run(words_of_all, check=False, capture_output=True, text=True, env=environment)
    return done.returncode, done.stdout, done.stderr


def test_every_architecture_gives_the_same_logits_when_two_processes_share_it(tmp_path: Path) -> None:
    (tmp_path / "shared.py").write_text(SHARED)
    torch.save(token_ids(), tmp_path / "ids.pt")
    for name in ARCHITECTURES:
        tiny_model(name).save_pretrained(tmp_path / name)
    code, _, err = run(f"{tmp_path}/shared.py", tmp_path, *ARCHITECTURES)
    assert code == 0, err


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A command that removes two layers and distils in two passes, less its output."""
    words = f"streamline prune {make_inputs(tmp_path_factory.mktemp('inputs'))} --layers 1,2 --heal distill"
    return f"{words} --heal-epochs 2 --heal-batch 4 --samples 4 --heal-tokens 1280 --length 32".split()


@pytest.fixture(scope="module")
def alone(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process makes."""
    out = tmp_path_factory.mktemp("alone") / "out"
    done = command(*words[1:], "--heal-cache", "none", out)
    assert (done.code, done.err) == (0, "")
    return out


def healing(out: Path) -> dict[str, Any]:
    [found] = json.loads((out / "streamline.json").read_text())["healing"]
    return dict(found)


@pytest.mark.parametrize(
    ("flags", "variables"),
    [
        ((), {}),
        pytest.param((), {"LOGITS": "20000"}, marks=pytest.mark.slow, id="a large vocabulary"),
        pytest.param(("--heal-dtype", "bf16"), {}, marks=pytest.mark.slow, id="bf16"),
        pytest.param(
            ("--heal-micro-batch", "1", "--heal-optimizer", "adamw-8bit"),
            {"FSDP_RESHARD_AFTER_FORWARD": "false", "FSDP_ACTIVATION_CHECKPOINTING": "true"},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_two_processes_that_share_the_weights_train_as_one(
    words: list[str], alone: Path, tmp_path: Path, flags: tuple[str, ...], variables: dict[str, str]
) -> None:
    out = tmp_path / "out"
    (tmp_path / "command.py").write_text(COMMAND)
    code, said, err = run(f"{tmp_path}/command.py", *words, *flags, out, **variables)
    assert code == 0, err
    assert not err or "LOGITS" in variables, err  # other libraries may say what they like to a script
    assert said.count("loading ") == said.count("saved ") == 1
    assert sorted(each.name for each in tmp_path.iterdir()) == ["command.py", "out"]
    ours, theirs = healing(out), healing(alone)
    tolerance = 1e-2 if {"adamw-8bit", "bf16"} & set(flags) else 1e-5
    losses = [[step["loss"] for step in healed["steps"]] for healed in (ours, theirs)]
    assert losses[0] == pytest.approx(losses[1], rel=tolerance)
    assert ours["best"] == pytest.approx(theirs["best"], rel=tolerance)
    weights = [load_file(each / "model.safetensors") for each in (out, alone)]
    assert weights[0].keys() == weights[1].keys()
    for name, value in weights[0].items():
        assert float((value - weights[1][name]).norm()) <= 10 * tolerance * float(weights[1][name].norm()), name


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_that_share_the_weights_train_as_a_cpu(words: list[str], alone: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, _, err = run("-m optimum.commands.optimum_cli", *words, "--device", "cuda", out)
    assert (code, err) == (0, "")
    assert healing(out)["best"] == pytest.approx(healing(alone)["best"], rel=0.02)


@pytest.mark.slow
def test_processes_that_share_the_weights_go_on_after_a_kill(words: list[str], tmp_path: Path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "killed" / "out"
    assert run("-m optimum.commands.optimum_cli", *words, whole)[0] == 0
    out.parent.mkdir()
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    environment = {**os.environ, **FSDP, "OMP_NUM_THREADS": "1"}
    begun = [*launcher, "-m", "optimum.commands.optimum_cli", *words, str(out)]
    with subprocess.Popen(begun, env=environment, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and not any(out.parent.glob(".out.healing-*/*/0/checkpoint-*/whole")):
            time.sleep(0.01)
        launched = psutil.Process(process.pid)
        for each in (launched, *launched.children(recursive=True)):
            each.kill()
    assert process.returncode == -signal.SIGKILL
    assert not out.exists()
    code, said, err = run("-m optimum.commands.optimum_cli", *words, out)
    assert (code, err) == (0, "")
    assert "continuing from the training checkpoints in " in said
    assert [folder.name for folder in out.parent.iterdir()] == ["out"]
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert healing(out) == healing(whole)


@pytest.mark.slow
def test_each_of_two_processes_holds_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 10, "vocab_size": 4096}
    tiny_model(**shape).save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(REFERENCE).save_pretrained(tmp_path / "model")
    (tmp_path / "peak.py").write_text(PEAK)
    words = f"streamline prune -m {tmp_path}/model --layers 2-4 --heal distill --heal-epochs 1 --heal-tokens 256"
    words += " --length 16 --calibration stdlib:calibration --heal-data stdlib:calibration --samples 8 "
    peaks = dict[str, list[int]]()
    for name, count, variables in (("none", 2, FSDP), ("one", 1, {}), ("two", 2, FSDP)):
        heal = ["--heal", "none"] if name == "none" else []
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(count), tmp_path / "peak.py"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
        subprocess.run([*launcher, *words.split(), *heal, tmp_path / name], check=True, env=environment)
        peaks[name] = [int(file.read_text()) for file in tmp_path.glob(f"{name}.peak-*")]
    program = min(peaks["none"])  # of the process that writes no file
    [one] = peaks["one"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(distributed, "_found", [Sharding(frees_layers=True, checkpoints=False)])
    fields = {"layers": "2-4", "heal": "distill", "heal_epochs": 1, "heal_tokens": 256, "length": 16}
    estimate = healing_memory(make_recipe(fields), tiny_model(**shape).config).total
    for each in peaks["two"]:
        assert (each - program) / (one - program) < 0.6, peaks
        assert 1 / 1.5 < (each - program) / estimate < 1.5, peaks


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"heal": "distill", "lora": True}, "trains (heal distill, lora)"),
        ({"heal": "distill", "heal_cache": "full"}, "trains (heal distill, heal-cache full)"),
        ({"heal": "local+distill"}, "trains (heal local+distill)"),
        ({"heal": "distill", "heal_original": "nf4"}, "trains (heal distill, heal-original nf4)"),
        ({"remove": 1, "heal": "distill"}, "trains (heal distill, method auto)"),
        ({"heal": "local", "device": "cuda"}, "trains layers on cuda (heal local)"),
        ({"heal": "lm"}, ""),
        ({"heal": "local"}, ""),
    ],
)
def test_trainings_that_cannot_share_the_weights_say_why(
    fields: dict[str, Any], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, config = make_recipe(fields if "remove" in fields else {"layers": "1", **fields}), tiny_model().config
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(distributed, "_found", [Sharding(frees_layers=True, checkpoints=False)])
    assert why_in_memory(recipe, config) == why
    if why and recipe.device == "cpu":
        with pytest.raises(
            StreamlineError, match=re.escape(f"ACCELERATE_USE_FSDP 'true': the recipe {why}, for which ")
        ):
            stays_on_disk(ModelSource(str(REFERENCE)), recipe, config, why)
