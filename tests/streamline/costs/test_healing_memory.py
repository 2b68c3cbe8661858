"""The estimated memory of healing is near what a process takes, and too little memory is said before any work."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from cases import make
from console import Outcome, optimum_cli
from optimum.streamline.costs import healing_memory as estimates
from optimum.streamline.costs.healing_memory import HealingMemory, healing_memory, warning
from optimum.streamline.errors import StreamlineError
from optimum.streamline.model_files.source import ModelSource
from optimum.streamline.pipeline.prune import prepare
from optimum.streamline.recipe.parsing import make_recipe
from optimum.streamline.system.notify import silent
from tiny import LAYERS, tiny_model

TEXT: dict[str, Any] = {"calibration": "stdlib:calibration", "heal_data": "stdlib:calibration", "length": 32}
DISTIL = {**TEXT, "method": "shortgpt", "remove": 2, "heal": "distill"}


def estimate(model: torch.nn.Module | None = None, **fields: Any) -> HealingMemory:
    return healing_memory(make_recipe({**DISTIL, **fields}), (model or tiny_model()).config)


def numbers(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_weights_are_counted() -> None:
    model = tiny_model()
    whole, layer = numbers(model), numbers(model.model.layers[0])
    left, found = whole - 2 * layer, estimate(model)
    assert (found.weights, found.original) == (4 * left, 4 * whole)
    assert (found.gradients, found.moments) == (4 * left, 8 * left)
    assert estimate(model, heal="lm").original == 0
    assert estimate(model, heal_optimizer="adamw-8bit").moments == 2 * left
    alone = estimate(model, method="llm-streamline", replacement="layer", heal="lm")
    assert (alone.gradients, alone.weights) == (4 * layer, 4 * left)
    mixed: dict[str, Any] = {"heal_dtype": "bf16"}
    assert estimate(model, **mixed).weights == 6 * left
    mixed["gradient_checkpointing"] = True
    assert estimate(model, **mixed).weights == 4 * left
    # The second window of an update finds gradients, and makes copies of all weights again.
    assert estimate(model, **mixed, heal_micro_batch=1).weights == 6 * left
    adapted = estimate(model, **mixed, heal_micro_batch=1, lora=True)
    assert adapted.weights == 4 * left + 6 * adapted.gradients // 4
    assert estimate(model, heal_cache="top-64", heal_hidden=0.0).original == 0
    for needed in ({"heal_cache": "none"}, {"heal_minutes": 1.0}, {"method": "auto"}, {"heal": "local+distill"}):
        assert estimate(model, **{"heal_cache": "full", **needed}).original == 4 * whole, needed
    local = estimate(model, heal="local")
    assert (local.gradients, local.weights, local.original) == (4 * layer, 4 * left, 4 * whole)
    on_disk = healing_memory(make_recipe({**DISTIL, "heal": "local"}), model.config, on_disk=True)
    assert (on_disk.gradients, on_disk.weights, on_disk.original) == (4 * layer, 4 * layer, 0)
    assert on_disk.activations == local.activations
    assert estimate(model, heal="local+distill") == found
    adapters = estimate(model, lora=True, lora_rank=1)
    assert adapters.gradients < found.gradients / 2
    assert adapters.weights == 4 * left + adapters.gradients


def test_compact_copies_are_counted() -> None:
    model = tiny_model()
    whole, layer = numbers(model), numbers(model.model.layers[0])
    left, matrices = (
        whole - 2 * layer,
        sum(each.numel() for each in model.model.layers[0].parameters() if each.ndim == 2),
    )
    for form, of_matrix in (("bf16", 2), ("int8", 1), ("nf4", 0.52)):
        found = estimate(model, heal_original=form, heal_cache="full")
        assert found.original == round(of_matrix * LAYERS * matrices + 2 * (whole - LAYERS * matrices))
        recipe = make_recipe({**DISTIL, "heal": "lm", "lora": True, "lora_base": form})
        of_base = round(of_matrix * (LAYERS - 2) * matrices + 2 * (left - (LAYERS - 2) * matrices))
        in_memory, on_disk = (healing_memory(recipe, model.config, on_disk) for on_disk in (False, True))
        assert in_memory.weights == 4 * left + in_memory.gradients + of_base
        assert on_disk.weights == on_disk.gradients + of_base


def test_what_takes_less_is_estimated_to_take_less() -> None:
    usual = estimate(heal_batch=4).activations
    for fields in ({"heal_micro_batch": 1}, {"gradient_checkpointing": True}, {"heal_dtype": "bf16"}, {"length": 16}):
        assert estimate(**{"heal_batch": 4, **fields}).activations < usual, fields


def test_too_little_memory_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source, recipe, said = ModelSource(str(make(tmp_path / "in"))), make_recipe(DISTIL), list[str]()
    prepare(source, recipe, said.append)
    assert not [line for line in said if "of memory" in line]
    monkeypatch.setattr(estimates, "free_memory", lambda: 1_000_000)
    prepare(source, recipe, said.append)
    [line] = [line for line in said if "of memory" in line]
    assert line.startswith("healing takes about ")
    assert "1.00 MB are free; lora, heal-optimizer adamw-8bit," in line
    assert warning(make_recipe({**DISTIL, "heal": "none"}), tiny_model().config) == ""


def test_the_memory_of_a_gpu_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    config, recipe = tiny_model().config, make_recipe({**DISTIL, "device": "cuda", "max_memory": "1MB"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert warning(recipe, config) == ""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (10**12, 10**12))
    assert warning(recipe, config) == ""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (10**5, 10**12))
    assert "100 kB are free" in warning(recipe, config)


def test_more_memory_than_the_limit_is_refused(tmp_path: Path) -> None:
    source = ModelSource(str(make(tmp_path / "in")))
    wide = {**DISTIL, "heal_batch": 3000, "length": 64}  # so that the activations take most
    needed = healing_memory(make_recipe(wide), tiny_model().config).total
    assert needed > 1e9
    limit = estimates.taken_memory() + needed // 2
    with pytest.raises(StreamlineError, match=r"max-memory .*: healing takes about .* with the program; give so much"):
        prepare(source, make_recipe({**wide, "max_memory": limit}), silent)
    prepare(source, make_recipe({**wide, "max_memory": limit, "heal_micro_batch": 4}), silent)


@pytest.mark.usefixtures("measured_once")
def test_a_dry_run_says_what_healing_takes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def cli(*words: Any) -> Outcome:
        return optimum_cli(monkeypatch, capsys, "streamline", *words)

    words = ("--layers", "1", "--heal-data", "stdlib:calibration", "--calibration", "stdlib", "--length", 32)
    source = make(tmp_path / "in")
    said = cli("prune", "-m", source, tmp_path / "out", *words, "--heal", "distill", "--dry-run").out
    [line] = [line for line in said.splitlines() if line.startswith("memory of healing, about: ")]
    for part in ("weights", "original", "gradients", "moments", "activations"):
        assert f"{part} " in line
    assert "memory of healing" not in cli("prune", "-m", source, tmp_path / "out", *words[:2], "--dry-run").out


MEASURED = """
import json, sys
from pathlib import Path
from optimum.streamline.model_files.source import ModelSource
from optimum.streamline.pipeline.prune import change, prepare
from optimum.streamline.recipe.parsing import make_recipe
from optimum.streamline.healing import transformers_trainer
from optimum.streamline.system.memory import taken_memory

def peak():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024

prepared = prepare(ModelSource(sys.argv[1]), make_recipe(json.loads(sys.argv[2])), lambda line: None)
weights = sum(each.nbytes for each in prepared.model.parameters())
before = taken_memory() - weights
Path("/proc/self/clear_refs").write_text("5")
change(prepared, lambda line: None, Path(sys.argv[3]))
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"heal_micro_batch": 1, "gradient_checkpointing": True},
        {"heal": "lm", "heal_dtype": "bf16"},
        {"heal": "local"},
        {"heal_cache": "top-64", "heal_hidden": 0.0},
        {"lora": True, "max_memory": "4GB"},  # so that freed memory is given back
        {"lora": True, "lora_base": "nf4", "heal_original": "int8", "max_memory": "4GB"},
        {"heal_original": "bf16"},
    ],
    ids=lambda fields: " ".join(map(str, fields.values())) or "distill",
)
def test_a_process_takes_what_is_estimated(fields: dict[str, Any], tmp_path: Path) -> None:
    shape = {"hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 8, "num_key_value_heads": 8}
    shape["max_position_embeddings"] = 256
    source = make(tmp_path / "in", **shape, num_hidden_layers=LAYERS)
    recipe = {**DISTIL, "length": 256, "heal_tokens": 256 * 12, "heal_epochs": 1, "heal_batch": 4, **fields}
    if recipe["heal"] == "distill":
        recipe.setdefault("heal_cache", "none")
    words = [sys.executable, "-c", MEASURED, str(source), json.dumps(recipe), str(tmp_path / "work")]
    found = int(subprocess.run(words, check=True, capture_output=True, text=True).stdout)
    expected = healing_memory(make_recipe(recipe), tiny_model(**shape).config).total
    assert found / 1.5 < expected < found * 1.5
