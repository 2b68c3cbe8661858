"""An original may compute in its own type while its layers are chosen, for removal alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, PreTrainedModel

from console import command
from optimum.streamline import StreamlineConfig, StreamlineError, Streamliner
from optimum.streamline.model_files.source import ModelSource
from optimum.streamline.pipeline import prune as prune_file
from optimum.streamline.recipe.parsing import make_recipe
from optimum.streamline.system.notify import silent
from reference import REFERENCE
from tiny import tiny_model

TEXT: dict[str, Any] = {"calibration": "stdlib:calibration", "samples": 6, "length": 16, "compute_dtype": "stored"}


@pytest.fixture(params=["llama", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gemma2", "gpt2"))])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A checkpoint in bf16."""
    tiny_model(request.param, vocab_size=4096).to(torch.bfloat16).save_pretrained(tmp_path / "in")
    AutoTokenizer.from_pretrained(REFERENCE).save_pretrained(tmp_path / "in")
    return tmp_path / "in"


def pruned(source: Path, out: Path, **fields: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    recipe = make_recipe({**TEXT, **fields})
    prune_file.prune(ModelSource(str(source)), recipe, out, overwrite=False, verbose=False, notify=silent)
    return load_file(out / "model.safetensors"), json.loads((out / "streamline.json").read_text())


@pytest.mark.parametrize("method", ["shortgpt", "sleb"])
def test_layers_are_chosen_in_the_stored_type(
    source: Path, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored = list[torch.dtype]()
    measure = prune_file.measure_scores

    def noted(model: PreTrainedModel, *rest: Any) -> Any:
        scored.append(model.get_input_embeddings()(torch.zeros(1, 1, dtype=torch.int64)).dtype)
        return measure(model, *rest)

    monkeypatch.setattr(prune_file, "measure_scores", noted)
    made = [
        pruned(source, tmp_path / name, method=method, remove=1, **fields)
        for name, fields in (("memory", {}), ("disk", {"max_memory": "1MB"}), ("fp32", {"compute_dtype": "fp32"}))
    ]
    assert scored == [torch.bfloat16, torch.bfloat16, torch.float32]
    (weights, record), (on_disk, recorded), (_, in_fp32) = made
    assert (record["scores"], record["plan"]) == (recorded["scores"], recorded["plan"])
    assert all(torch.equal(value, on_disk[name]) for name, value in weights.items())
    influences = [each["scores"]["block_influence"] for each in (record, in_fp32)]
    assert influences[0] != influences[1]
    assert influences[0] == pytest.approx(influences[1], abs=0.02)


def test_the_weights_that_stay_are_those_of_the_original(source: Path, tmp_path: Path) -> None:
    before = load_file(source / "model.safetensors")
    after, _ = pruned(source, tmp_path / "out", layers="4")
    assert all(torch.equal(value, before[name]) for name, value in after.items())


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (("--method", "come"), "method 'come': merges weights, so it needs fp32, and compute-dtype is 'stored'; leave"),
        (
            ("--method", "auto", "--heal", "none"),
            "method 'auto': tries merges, linear maps and corrections, so it",
        ),
        (("--method", "sleb", "--replacement", "corrected"), "replacement 'corrected': needs fp32, and compute-dtype"),
        (("--method", "sleb", "--heal", "lm"), "heal 'lm': needs fp32, and compute-dtype is 'stored'; leave compute-"),
    ],
)
def test_what_computes_weights_is_refused(flags: tuple[str, ...], line: str, tmp_path: Path) -> None:
    words = ("--remove", 2, "--compute-dtype", "stored", "--calibration", "stdlib:calibration")
    outcome = command("prune", "-m", REFERENCE, *words, *flags, tmp_path / "out")
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert outcome.err.startswith(f"error: {line}")
    assert list(tmp_path.iterdir()) == []


def test_the_python_api_says_that_it_computes_in_fp32() -> None:
    config = StreamlineConfig(remove=1, method="shortgpt", **TEXT)
    with pytest.raises(StreamlineError, match="compute-dtype 'stored': the steps compute in fp32; use `optimum-cli"):
        Streamliner.from_pretrained(str(REFERENCE)).prune(config)
