"""Trainings with compact copies: adapters on weights of few bits (QLoRA), and an original of few bits to learn from."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from console import command
from optimum.streamline.checkpoints.loading import load_stock
from optimum.streamline.healing.losses import NextToken, window_divergences
from optimum.streamline.healing.settings import HealSettings
from optimum.streamline.healing.trainable_parts import train_model
from optimum.streamline.model_files.source import ModelSource
from optimum.streamline.pipeline import larger_than_memory
from optimum.streamline.pipeline.prune import change, prepare, prune
from optimum.streamline.recipe.parsing import make_recipe
from optimum.streamline.system.notify import silent
from optimum.streamline.text.windows import Windows
from reference import REFERENCE
from tiny import tiny_model

pytestmark = pytest.mark.quantizers
COUNTING = Windows((torch.arange(40)[:, None] + torch.arange(24)) % 50 + 2, "counting")
RANK = 2
TEXT: dict[str, Any] = {"calibration": "stdlib:calibration", "samples": 4, "heal_data": "stdlib:calibration"}
TEXT |= {"length": 64, "heal_tokens": 64 * 80, "heal_epochs": 1, "layers": "4-7", "heal": "distill"}


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("base", ["bf16", "int8", "nf4"])
def test_adapters_on_a_compact_copy_change_the_weights_as_they_were_by_a_low_rank(architecture: str, base: Any) -> None:
    model = tiny_model(architecture)
    before, dtypes = copy.deepcopy(model.state_dict()), {each.dtype for each in model.parameters()}
    settings = HealSettings(lr=3e-2, epochs=5, lora_rank=RANK, lora_base=base)
    log = train_model(model, NextToken(), COUNTING, settings)
    assert log.best < 0.9 * log.before
    assert {each.dtype for each in model.parameters()} == dtypes
    changes = {name: value - before[name] for name, value in model.state_dict().items()}
    changed = {name: each for name, each in changes.items() if each.count_nonzero()}
    assert changed
    for name, each in changed.items():
        matrices = [each] if each.ndim == 2 else list(each)  # one for each expert, some of two matrices in one
        rank = RANK if each.ndim == 2 else 2 * RANK
        for matrix in matrices:
            values = torch.linalg.svdvals(matrix)
            assert values[rank] <= 1e-5 * values[0], name
    # The float weights with the adapters answer as well as the copy with them, which the log is of.
    with torch.no_grad():
        loss = NextToken().loss(model.eval(), COUNTING.ids[38:])
    assert float(loss) == pytest.approx(log.best, rel=0.3)


def test_adapters_on_a_copy_leave_the_weights_on_disk(tmp_path: Path) -> None:
    forms = {"lora": True, "lora_base": "nf4", "heal_original": "int8", "heal_lr": 0.01}
    tiny_model(vocab_size=4096).save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(REFERENCE).save_pretrained(tmp_path / "model")
    source, made, said = ModelSource(str(tmp_path / "model")), [], list[str]()
    for name, fields in (("plain", {"heal": "none"}), ("healed", forms)):
        recipe = make_recipe({**TEXT, "layers": "2", **fields})
        prune(source, recipe, tmp_path / name, overwrite=False, verbose=False, notify=said.append)
        assert (larger_than_memory.COPIES in said) == (name == "healed")
        made.append(load_file(tmp_path / name / "model.safetensors"))
    plain, healed = made
    assert plain.keys() == healed.keys()
    changed = {name for name, value in plain.items() if not torch.equal(value, healed[name])}
    assert changed == {name for name in plain if name.endswith("_proj.weight")}


def divergence(**fields: Any) -> float:
    """That of a healed model from the original in fp32, on text that it did not train on."""
    prepared = prepare(ModelSource(str(REFERENCE)), make_recipe({**TEXT, **fields}), silent)
    change(prepared, silent)
    original, ids = load_stock(ModelSource(str(REFERENCE)), torch.float32), prepared.chosen_on.ids
    return float(window_divergences(original, prepared.model, ids).mean())


@pytest.mark.parametrize("forms", [("nf4",), pytest.param(("bf16", "int8"), marks=pytest.mark.slow)])
def test_a_compact_original_teaches_nearly_as_well(forms: tuple[str, ...]) -> None:
    usual, unhealed = divergence(), divergence(heal="none")
    assert usual < 0.85 * unhealed
    found = {form: divergence(heal_original=form) for form in forms}
    assert len({usual, *found.values()}) == 1 + len(forms), found  # each learned from another original
    for form, value in found.items():
        assert value == pytest.approx(usual, rel=0.1), form


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (("--heal", "distill", "--lora-base", "nf4"), "lora-base 'nf4': has no effect without lora"),
        (("--heal", "lm", "--heal-original", "int8"), "heal-original 'int8': has no effect without heal distill"),
        (("--heal", "local+distill", "--heal-original", "bf16"), "heal-original 'bf16': heal local compares with the"),
        (
            ("--heal", "distill", "--lora", "--lora-base", "int2"),
            "flags: lora-base is 'int2': Input should be 'fp32', 'bf16', 'int8' or 'nf4'",
        ),
    ],
)
def test_a_form_that_does_nothing_is_refused(tmp_path: Path, flags: tuple[str, ...], line: str) -> None:
    outcome = command("prune", "-m", REFERENCE, "--layers", "4-7", *flags, tmp_path / "out")
    assert outcome.code == 2
    assert outcome.err.startswith(f"error: {line}")
    assert outcome.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
