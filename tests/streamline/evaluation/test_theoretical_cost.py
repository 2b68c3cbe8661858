"""Theoretical costs: computed by hand for one model, and from the modules for the others."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, PreTrainedModel

from optimum.streamline.editing.apply import apply_plan, build_replacement
from optimum.streamline.editing.plan import Plan
from optimum.streamline.evaluation.theoretical_cost import cost_of, disk_bytes
from optimum.streamline.models.architectures import ARCHITECTURES, decoder_layers
from tiny import COMMON, LAYERS, every, tiny_model

WIDTH, INNER, VOCABULARY = 32, 48, 128
ATTENTION = 32 * 32 + 2 * 16 * 32 + 32 * 32  # q, k and v of 2 heads of 8, o
MLP = 3 * WIDTH * INNER
LAYER = ATTENTION + MLP + 2 * WIDTH


def llama(**fields: object) -> LlamaConfig:
    return LlamaConfig(**{**COMMON, "tie_word_embeddings": False, **fields})


@pytest.mark.parametrize("tied", [False, True])
def test_llama_by_hand(tied: bool) -> None:
    cost = cost_of(llama(tie_word_embeddings=tied), "fp16")
    read = LAYERS * LAYER + WIDTH + VOCABULARY * WIDTH  # layers, norm and head; rows of the embedding are for free
    assert cost.read_parameters == read
    assert cost.parameters == cost.live_parameters == read + (0 if tied else VOCABULARY * WIDTH)
    assert (cost.layers, cost.attention_layers) == (LAYERS, LAYERS)
    assert cost.kv_bytes_per_token == LAYERS * 2 * 2 * 8 * 2
    assert cost.decode_bytes(100) == 2 * read + 100 * cost.kv_bytes_per_token
    assert cost.prefill_flops(10) == 2 * read * 10 + LAYERS * 4 * 32 * 55  # 55 pairs of tokens that see each other


def test_dtype_scales_bytes_and_not_flops() -> None:
    half, full = cost_of(llama(), "bf16"), cost_of(llama(), "fp32")
    assert full.decode_bytes(7) == 2 * half.decode_bytes(7)
    assert full.prefill_flops(7) == half.prefill_flops(7)


@pytest.mark.parametrize("architecture", every())
def test_dead_attention_costs_nothing(architecture: str) -> None:
    model: PreTrainedModel = tiny_model(architecture)
    before = cost_of(model.config, "fp32")
    plan = Plan(LAYERS, (1, 2, 3), "mlp")
    apply_plan(model, plan, build_replacement(model, plan))
    after = cost_of(model.config, "fp32")
    assert (after.layers, after.attention_layers) == (LAYERS - 2, LAYERS - 3)
    assert after.live_parameters < after.parameters == model.num_parameters()
    assert after.kv_bytes_per_token * LAYERS == before.kv_bytes_per_token * (LAYERS - 3)
    assert after.decode_bytes(20) < before.decode_bytes(20)
    assert after.prefill_flops(20) < before.prefill_flops(20)


def test_dead_parameters_by_hand() -> None:
    model = tiny_model()
    plan = Plan(LAYERS, (1, 2), "mlp")
    apply_plan(model, plan, build_replacement(model, plan))
    cost = cost_of(model.config, "fp32")
    assert cost.parameters - cost.live_parameters == ATTENTION


@pytest.mark.parametrize("architecture", every())
def test_a_dead_mlp_costs_nothing_and_keeps_its_cache(architecture: str) -> None:
    model: PreTrainedModel = tiny_model(architecture)
    before, row = cost_of(model.config, "fp32"), ARCHITECTURES[architecture]
    apply_plan(model, Plan(LAYERS, (), skipped=((1, "mlp"), (3, "mlp"))), None)
    after = cost_of(model.config, "fp32")
    removed = [
        decoder_layers(model, row)[layer].get_submodule(name).parameters() for layer in (1, 3) for name in row.mlp
    ]
    assert before.live_parameters - after.live_parameters == sum(p.numel() for part in removed for p in part)
    assert (after.parameters, after.layers, after.windows) == (before.parameters, LAYERS, before.windows)
    assert after.kv_bytes_per_token == before.kv_bytes_per_token
    assert after.decode_bytes(20) < before.decode_bytes(20)
    assert after.prefill_flops(20) < before.prefill_flops(20)


def test_dead_mlp_by_hand() -> None:
    model = tiny_model()
    before = cost_of(model.config, "fp32")
    apply_plan(model, Plan(LAYERS, (), skipped=((0, "mlp"), (2, "attention"), (2, "mlp"))), None)
    after = cost_of(model.config, "fp32")
    assert after.parameters - after.live_parameters == 2 * MLP + ATTENTION
    assert before.read_parameters - after.read_parameters == 2 * MLP + ATTENTION
    assert after.attention_layers == LAYERS - 1


def test_of_experts_only_the_active_share_is_read() -> None:
    def read(active: int) -> int:
        return cost_of(tiny_model("mixtral", num_experts_per_tok=active).config, "fp32").read_parameters

    assert read(4) - read(2) == 2 * (read(2) - read(1)) == LAYERS * 2 * MLP


def test_a_full_window_grows_no_more() -> None:
    config = tiny_model("gemma2").config  # two of five layers see 6 tokens back
    cost = cost_of(config, "fp32")
    assert cost.windows == (None, 6, None, 6, None)
    growth = cost.decode_bytes(21) - cost.decode_bytes(20)
    assert growth * LAYERS == cost.kv_bytes_per_token * 3


def test_size_on_disk_is_that_of_the_weights(tmp_path: Path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path)
    stored = sum(value.numel() for value in model.parameters()) * 4
    assert stored < disk_bytes(tmp_path) < stored + 20_000
    (tmp_path / "artifact.json").write_text("{}")
    (tmp_path / "model.onnx").write_bytes(b"x" * 10)
    (tmp_path / "model.onnx.data").write_bytes(b"x" * 1000)
    assert disk_bytes(tmp_path) == 1010


def test_nothing_is_allocated() -> None:
    before = torch.get_default_device()
    cost = cost_of(llama(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, vocab_size=128256), "bf16")
    assert cost.parameters > 50e9
    assert torch.get_default_device() == before
