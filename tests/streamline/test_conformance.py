"""Every architecture of the table goes through everything: scores, edits, disk, stock transformers, its cache."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, BertConfig, PreTrainedModel

from optimum.streamline.anatomy import ARCHITECTURES, architecture_of, decoder_layers
from optimum.streamline.checkpoint import load
from optimum.streamline.dead import DeadAttention, dead_sublayers
from optimum.streamline.edit import apply_plan, build_replacement, planned_config
from optimum.streamline.errors import StreamlineError
from optimum.streamline.plan import Plan
from optimum.streamline.scores import measure_scores
from optimum.streamline.windows import Windows
from tiny import LAYERS, tiny_model, token_ids

ALL = sorted(ARCHITECTURES)
REMOVAL = Plan(LAYERS, (1, 3))
PLANS = {
    "remove": REMOVAL,
    "layer": Plan(LAYERS, (1, 2, 3), "layer"),
    "mlp": Plan(LAYERS, (1, 2, 3), "mlp"),
    "mlp-first": Plan(LAYERS, (0, 1), "mlp"),
}


def logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


def greedy(model: PreTrainedModel, use_cache: bool) -> list[list[int]]:
    ids = token_ids(2, 9, seed=3)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    ids[0, :4] = 1
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=8, min_new_tokens=8, do_sample=False, use_cache=use_cache
    )
    return out.tolist()


@pytest.mark.parametrize("architecture", ALL)
def test_scores_are_those_of_the_raw_residual_stream(architecture: str) -> None:
    model, ids = tiny_model(architecture), token_ids(3, 20)
    scores = measure_scores(model, Windows(ids, "random"))
    stream: list[torch.Tensor] = []
    layers = decoder_layers(model, ARCHITECTURES[architecture])

    def keep_input(_: object, args: tuple[torch.Tensor, ...], kwargs: dict[str, torch.Tensor]) -> None:
        stream.append((args[0] if args else kwargs["hidden_states"]).double())

    def keep_output(_: object, args: object, output: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
        stream.append((output[0] if isinstance(output, tuple) else output).double())

    hooks = [layers[i].register_forward_pre_hook(keep_input, with_kwargs=True) for i in range(LAYERS)]
    hooks.append(layers[LAYERS - 1].register_forward_hook(keep_output))
    logits(model, ids)
    for hook in hooks:
        hook.remove()
    for first in range(LAYERS):
        a, b = stream[first], stream[first + 1]
        cosines = [
            float(a[row, t] @ b[row, t] / (a[row, t].norm() * b[row, t].norm())) for row in range(3) for t in range(20)
        ]
        assert scores.block_influence[first] == pytest.approx(1 - sum(cosines) / len(cosines), abs=1e-6)


@pytest.mark.parametrize("edit", PLANS)
@pytest.mark.parametrize("architecture", ALL)
def test_edit_survives_disk_stock_transformers_and_the_cache(architecture: str, edit: str, tmp_path: Path) -> None:
    model, plan, ids = tiny_model(architecture), PLANS[edit], token_ids()
    before = logits(model, ids)
    expected_config = planned_config(model.config, plan)
    apply_plan(model, plan, build_replacement(model, plan))
    assert model.config.num_hidden_layers == LAYERS - plan.net
    assert model.config.to_dict() == expected_config.to_dict()
    edited = logits(model, ids)
    assert (edited - before).abs().max() > 1e-3
    model.save_pretrained(tmp_path)

    stock, info = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)
    stock.eval()
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    torch.testing.assert_close(logits(stock, ids), edited, atol=1e-5, rtol=0)
    assert greedy(stock, use_cache=True) == greedy(stock, use_cache=False)

    ours = load(str(tmp_path))
    torch.testing.assert_close(logits(ours, ids), edited, atol=1e-5, rtol=0)
    assert greedy(ours, use_cache=True) == greedy(stock, use_cache=True)
    dropped = sum(isinstance(module, DeadAttention) for module in ours.modules())
    assert dropped == len(dead_sublayers(ours.config)) == (1 if "mlp" in edit else 0)


@pytest.mark.parametrize("architecture", ALL)
def test_removal_is_skipping(architecture: str) -> None:
    model, ids = tiny_model(architecture), token_ids()
    kept = tiny_model(architecture)
    apply_plan(kept, REMOVAL, None)
    # A skipped layer is one that returns what it was given.
    for index in REMOVAL.gone:
        layer = decoder_layers(model, architecture_of(model.config))[index]

        def passed_on(
            _: object, args: tuple[torch.Tensor, ...], kwargs: dict[str, torch.Tensor], out: object
        ) -> object:
            hidden = args[0] if args else kwargs["hidden_states"]
            return (hidden, *out[1:]) if isinstance(out, tuple) else hidden

        layer.register_forward_hook(passed_on, with_kwargs=True)
    torch.testing.assert_close(logits(kept, ids), logits(model, ids), atol=1e-5, rtol=0)


def test_per_layer_config_fields_follow_their_layers() -> None:
    gemma = planned_config(tiny_model("gemma2").config, REMOVAL)
    assert gemma.layer_types == ["full_attention", "full_attention", "full_attention"]
    qwen = planned_config(tiny_model("qwen2").config, REMOVAL)
    assert qwen.max_window_layers == 1
    moe = planned_config(tiny_model("qwen3_moe").config, Plan(LAYERS, (1, 2)))
    assert moe.mlp_only_layers == [1]
    smol = planned_config(tiny_model("smollm3").config, REMOVAL)
    assert smol.no_rope_layers == [1, 0, 0]


def test_other_architectures_are_refused_by_name() -> None:
    with pytest.raises(StreamlineError, match=r"'bert' cannot be handled; those that can: gemma, .*qwen3"):
        architecture_of(BertConfig())


def test_layers_that_depend_on_their_number_are_refused() -> None:
    config = tiny_model("gpt2").config
    config.scale_attn_by_inverse_layer_idx = True
    with pytest.raises(StreamlineError, match="scale_attn_by_inverse_layer_idx is True"):
        architecture_of(config)
