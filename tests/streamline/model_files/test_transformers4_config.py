"""A saved checkpoint computes the same in transformers 4, which has other names for some config fields."""

from __future__ import annotations

import copy
import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoTokenizer

from optimum.streamline.checkpoints.saving import save_model
from optimum.streamline.models.architectures import ARCHITECTURES
from reference import REFERENCE
from tiny import tiny_model, token_ids

ROPE: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "longrope": {"rope_type": "longrope", "short_factor": [1.0, 2.0, 3.0, 4.0], "long_factor": [2.0, 3.0, 4.0, 5.0]},
}
# The kinds of rotary embedding that transformers 4 supports in these architectures.
KINDS = {"phi3": ("default", "longrope"), "olmo2": ("default",)}
# Those with embeddings of their own for each kind of attention have a test of their own. Ministral 3 is newer.
OTHERS = {"gemma3_text", "ministral3"}
CASES = [
    (name, kind)
    for name in sorted(ARCHITECTURES.keys() - OTHERS)
    for kind in KINDS.get(name, ("default", "linear", "llama3"))
]
# These architectures have no rotary embeddings.
CASES = [case for case in CASES if case[0] not in ("gpt2", "opt") or case[1] == "default"]

LOGITS = """
import sys, numpy, torch
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(torch.from_numpy(numpy.load(folder + "/ids.npy"))).logits
    numpy.save(folder + "/logits.npy", logits.numpy())
"""


def save(architecture: str, kind: str, folder: Path) -> Any:
    """Save a tiny model whose rotary embedding settings all differ from transformers' defaults."""
    fields: dict[str, Any] = {}
    if architecture not in ("gpt2", "opt"):
        share = {"partial_rotary_factor": 0.5} if architecture == "gpt_neox" else {}
        fields["rope_parameters"] = {**ROPE[kind], "rope_theta": 50_000.0, **share}
    if kind == "longrope":
        fields["original_max_position_embeddings"] = 16
    model = tiny_model(architecture, **fields)
    save_model(model, AutoTokenizer.from_pretrained(REFERENCE), torch.float32, folder)
    return model


@pytest.mark.parametrize(("architecture", "kind"), CASES)
def test_the_newer_reads_what_was_saved(architecture: str, kind: str, tmp_path: Path) -> None:
    saved = save(architecture, kind, tmp_path).config
    read = AutoConfig.from_pretrained(tmp_path)
    for config in (saved, read):
        (getattr(config, "rope_parameters", None) or {}).pop("type", None)  # an alias of `rope_type`
    keys = saved.to_dict().keys() - {"_name_or_path", "dtype", "transformers_version"}  # fields that saving itself sets
    assert {key: getattr(read, key) for key in keys} == {key: getattr(saved, key) for key in keys}


def test_the_older_names_are_those_of_the_hub(tmp_path: Path) -> None:
    save("llama", "llama3", tmp_path / "llama")
    fields = json.loads((tmp_path / "llama" / "config.json").read_text())
    assert fields["rope_theta"] == 50_000.0
    assert fields["rope_scaling"] == ROPE["llama3"] | {"type": "llama3"}
    save("qwen3_moe", "default", tmp_path / "moe")
    fields = json.loads((tmp_path / "moe" / "config.json").read_text())
    assert fields["num_experts"] == 4
    assert "rope_scaling" not in fields


def test_the_older_names_of_two_rotary_embeddings(tmp_path: Path) -> None:
    kinds = {
        "full_attention": {**ROPE["linear"], "rope_theta": 50_000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 7_000.0},
    }
    model = tiny_model("gemma3_text", rope_parameters=copy.deepcopy(kinds))
    save_model(model, AutoTokenizer.from_pretrained(REFERENCE), torch.float32, tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    assert fields["rope_theta"] == 50_000.0
    assert fields["rope_scaling"] == {**ROPE["linear"], "type": "linear"}
    assert fields["rope_local_base_freq"] == 7_000.0
    read = AutoConfig.from_pretrained(tmp_path).rope_parameters
    assert read["full_attention"].pop("type") == "linear"  # an alias of `rope_type`
    assert read == kinds


@pytest.mark.slow
def test_the_older_computes_what_was_saved(optimum_onnx: str, tmp_path: Path) -> None:
    ids, expected = token_ids(2, 40), {}
    for architecture, kind in CASES:
        folder = tmp_path / f"{architecture}-{kind}"
        model = save(architecture, kind, folder)
        np.save(folder / "ids.npy", ids.numpy())
        with torch.inference_mode():
            expected[folder] = model(ids).logits.numpy()
    subprocess.run([optimum_onnx, "-c", LOGITS, *map(str, expected)], check=True, capture_output=True)
    for folder, logits in expected.items():
        tolerance = 1e-3 if "gemma2" in folder.name else 1e-5  # transformers 4 computes Gemma 2 a little differently
        difference = np.abs(np.load(folder / "logits.npy") - logits).max()
        assert difference < tolerance * np.abs(logits).max(), folder.name
