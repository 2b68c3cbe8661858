"""Tests that a model with bare layers exports to ONNX with parity, and with cache entries for real attentions only."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from optimum.exporters.streamline import export_checkpoint
from optimum.streamline.checkpoints.loading import read_config
from optimum.streamline.editing.apply import apply_plan, build_replacement
from optimum.streamline.editing.plan import Plan
from optimum.streamline.evaluation.theoretical_cost import cost_of
from optimum.streamline.model_files.source import ModelSource
from optimum.streamline.models.bare_layers import save_bare
from tiny import LAYERS, tiny_model

pytestmark = pytest.mark.onnx


@pytest.mark.parametrize(
    ("architecture", "kind", "removed"),
    [
        ("llama", "ffn", (0, 1, 2)),
        pytest.param("gpt2", "swiglu", (1, 2, 3), marks=pytest.mark.slow),
        pytest.param("qwen3", "ffn", (2, 3, 4), marks=pytest.mark.slow),
    ],
)
def test_export_has_parity_and_a_cache_for_real_attentions_only(
    architecture: str, kind: str, removed: tuple[int, ...], tmp_path: Path
) -> None:
    model, plan = tiny_model(architecture), Plan(LAYERS, removed, kind)
    apply_plan(model, plan, build_replacement(model, plan))
    save_bare(model, tmp_path / "checkpoint")
    artifact = export_checkpoint(str(tmp_path / "checkpoint"), tmp_path / "onnx")
    assert len(artifact.parity) == 5
    assert all(difference < 1e-4 for difference in artifact.parity.values())
    graph = onnx.load(tmp_path / "onnx" / "model.onnx", load_external_data=False).graph
    keys = [value.name for value in graph.input if value.name.endswith(".key")]
    assert keys == ["past_key_values.0.key", "past_key_values.1.key"]
    assert sum(node.op_type == "Attention" for node in graph.node) == 2
    # The export's config has the original model type, and still gives the right cost: no runtime knows bare layers.
    config = read_config(ModelSource(str(tmp_path / "onnx")), of_export=True)
    assert config.model_type == architecture
    assert cost_of(config, "fp32").attention_layers == 2
