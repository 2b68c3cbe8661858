"""Models with the configs of the Hub are pruned, delivered, and computed by stock transformers.

`hub_configs.json` has the configs of checkpoints in the form and with the fields that each has on the Hub, written from
memory and small.
transformers fills in and renames fields as it reads a config. So what it saves itself is no test of what users have.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from behaviour import logits, stock_model
from console import Outcome, optimum_cli
from optimum.streamline.editing.apply import apply_plan
from optimum.streamline.editing.plan import Plan
from reference import REFERENCE
from tiny import token_ids

Cli = Callable[..., Outcome]
HUB_CONFIGS = json.loads((Path(__file__).parents[2] / "hub_configs.json").read_text())
# Scaled rotary embeddings in the form of transformers 4 and 5, two kinds of attention, code of its own, an old config.
FAST = {"Llama 3.2", "Gemma 3", "Phi-3.5", "EXAONE 4", "Ministral 3", "GPT-2"}


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    return lambda *words: optimum_cli(monkeypatch, capsys, "streamline", *words)


def write(folder: Path, config: dict[str, Any], generation: dict[str, Any] | None) -> None:
    """Write a random model whose config files are these, to the letter."""
    torch.manual_seed(0)
    known = {key: value for key, value in config.items() if key != "auto_map"}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**known), dtype=torch.float32)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(REFERENCE).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").unlink(missing_ok=True)
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))


@pytest.mark.parametrize(
    "family", [pytest.param(each, marks=() if each in FAST else pytest.mark.slow) for each in HUB_CONFIGS]
)
def test_a_model_with_a_config_of_the_hub_is_delivered(family: str, cli: Cli, tmp_path: Path) -> None:
    fields = HUB_CONFIGS[family]
    write(tmp_path / "in", fields["config"], fields.get("generation_config"))
    outcome = cli("prune", "-m", tmp_path / "in", tmp_path / "out", "--layers", "1,2", "--length", 64)
    assert outcome.code == 0, outcome.err
    expected = stock_model(tmp_path / "in")
    apply_plan(expected, Plan(5, (1, 2)), None)
    ids = token_ids()
    torch.testing.assert_close(logits(stock_model(tmp_path / "out"), ids), logits(expected, ids), atol=1e-5, rtol=0)
