"""Checkpoints on disk: stock transformers loads them without this package, and broken ones are refused in one line."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from optimum.streamline.checkpoints.loading import load, load_stock, read_config
from optimum.streamline.checkpoints.saving import save_model
from optimum.streamline.editing.apply import apply_plan, build_replacement
from optimum.streamline.editing.plan import Plan
from optimum.streamline.errors import StreamlineError
from optimum.streamline.healing.settings import HealSettings
from optimum.streamline.healing.trainable_parts import train_replacement
from optimum.streamline.model_files.source import ModelSource, fingerprint
from optimum.streamline.text.windows import Windows
from reference import REFERENCE
from tiny import LAYERS, tiny_model, token_ids

# A script for a process in which this package cannot be imported.
STRANGER = """
import sys
sys.modules["optimum.streamline"] = None
sys.modules["optimum.exporters.streamline"] = None
try:
    import optimum.streamline
    raise SystemExit("optimum.streamline could be imported")
except ImportError:
    pass
import torch
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        torch.save(model.eval()(torch.load("ids.pt")).logits, folder + ".pt")
"""


def test_a_stranger_gets_the_same_logits(tmp_path: Path) -> None:
    ids, expected = token_ids(2, 40), {}
    for kind in ("none", "layer", "mlp"):
        model = load_stock(ModelSource(REFERENCE), torch.float32)
        plan = Plan(16, (5, 6, 7, 8, 9) if kind != "none" else (4, 6, 9, 12), kind)
        replacement = build_replacement(model, plan)
        if replacement is not None:
            text = Windows(token_ids(8, 32), "random")
            train_replacement(model, plan, replacement.layer, text, HealSettings(lr=1e-3))
        apply_plan(model, plan, replacement)
        with torch.no_grad():
            expected[kind] = model(ids).logits
        save_model(model, AutoTokenizer.from_pretrained(REFERENCE), torch.float32, tmp_path / kind)
    torch.save(ids, tmp_path / "ids.pt")
    subprocess.run(
        [sys.executable, "-c", STRANGER, *expected], check=True, capture_output=True, text=True, cwd=tmp_path
    )
    for kind, logits in expected.items():
        assert (torch.load(tmp_path / f"{kind}.pt") - logits).abs().max() < 1e-5, kind


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A saved model with a skipped attention in layer 1."""
    model, plan = tiny_model(), Plan(LAYERS, (1, 2), "mlp")
    apply_plan(model, plan, build_replacement(model, plan))
    model.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    file = folder / "model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def poison(weights: dict[str, torch.Tensor]) -> None:
    weights["model.layers.2.mlp.up_proj.weight"][3, 4] = float("nan")


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (truncate, "not a safetensors file, or is incomplete"),
        (
            lambda f: edit_weights(f, lambda w: w.pop("model.layers.2.mlp.up_proj.weight")),
            "1 weights, first 'model.layers.2.mlp.up_proj.weight', are missing in its files",
        ),
        (
            lambda f: edit_weights(f, lambda w: w.update(stray=torch.ones(1))),
            "first 'stray', are in its files but not in",
        ),
        (lambda f: edit_weights(f, poison), "weight model.layers.2.mlp.up_proj.weight holds NaN"),
        (lambda f: (f / "model.safetensors").unlink(), "has no weights, neither model.safetensors nor"),
        (lambda f: (f / "config.json").write_text("{"), "cannot be read"),
        (lambda f: (f / "config.json").unlink(), "it has no config.json"),
        (
            lambda f: edit_weights(f, lambda w: w["model.layers.1.self_attn.o_proj.weight"].fill_(1.0)),
            "layer 1 is said to skip its attention, but its output projection is not zero",
        ),
    ],
)
def test_a_broken_checkpoint_is_refused(saved: Path, break_it: Callable[[Path], object], message: str) -> None:
    load(str(saved))
    break_it(saved)
    with pytest.raises(StreamlineError, match=message) as caught:
        load(str(saved))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "bert"}, "architecture 'bert': is not supported; supported are"),
        ({"model_type": "t5"}, "architecture 't5': is not supported"),
    ],
)
def test_models_of_another_kind_are_refused(tmp_path: Path, config: dict[str, object], message: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(StreamlineError, match=message):
        read_config(ModelSource(str(tmp_path)))


def test_a_path_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StreamlineError, match="no such folder; give a checkpoint's folder or a Hub id"):
        read_config(ModelSource(str(tmp_path / "nowhere")))


@pytest.mark.parametrize("name", ["a/b/c", "a/b/c@main"])
def test_a_name_with_two_slashes_is_a_folder_and_no_hub_id(name: str) -> None:
    with pytest.raises(StreamlineError, match="no such folder; give a checkpoint's folder or a Hub id"):
        read_config(ModelSource(name))


@pytest.mark.parametrize(("architecture", "attention"), [("gpt2", "attn"), ("gpt_neox", "attention")])
def test_a_constant_of_old_checkpoints_is_no_unexpected_weight(
    architecture: str, attention: str, tmp_path: Path
) -> None:
    model = tiny_model(architecture)
    model.save_pretrained(tmp_path)
    layer = "transformer.h.0" if architecture == "gpt2" else "gpt_neox.layers.0"
    edit_weights(tmp_path, lambda weights: weights.update({f"{layer}.{attention}.masked_bias": torch.tensor(-1e4)}))
    assert torch.equal(load(str(tmp_path))(token_ids()).logits, model(token_ids()).logits)


def test_a_cast_leaves_whole_numbers_alone(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.register_buffer("counts", torch.tensor([300, 70_001]))  # bf16 holds neither
    save_model(model, AutoTokenizer.from_pretrained(REFERENCE), torch.bfloat16, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert stored["counts"].tolist() == [300, 70_001]
    assert stored["model.norm.weight"].dtype == torch.bfloat16


def test_the_fingerprint_follows_weights_and_config_only(saved: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(saved, tmp_path / "copy")
    (copy / "README.md").write_text("other words")
    assert fingerprint(ModelSource(str(saved))) == fingerprint(ModelSource(str(copy)))
    edit_weights(copy, lambda weights: weights["model.norm.weight"].add_(1))
    assert fingerprint(ModelSource(str(saved))) != fingerprint(ModelSource(str(copy)))
