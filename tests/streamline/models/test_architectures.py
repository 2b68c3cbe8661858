"""Every supported architecture: scoring, editing, saving, loading in stock transformers, and the cache."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import BertConfig, PreTrainedModel

from behaviour import greedy, logits, stock_model
from optimum.streamline.checkpoints.loading import load
from optimum.streamline.editing.apply import apply_plan, build_replacement, planned_config
from optimum.streamline.editing.plan import Plan
from optimum.streamline.errors import StreamlineError
from optimum.streamline.methods.base import MethodInputs
from optimum.streamline.methods.registry import method_of
from optimum.streamline.models.architectures import ARCHITECTURES, architecture_of, decoder_layers
from optimum.streamline.models.skipped_sublayers import SkippedAttention, SkippedMLP, skipped_sublayers
from optimum.streamline.recipe.parsing import make_recipe
from optimum.streamline.scoring.similarity import measure_scores
from optimum.streamline.text.windows import Windows
from tiny import LAYERS, tiny_model, token_ids

ALL = sorted(ARCHITECTURES)
REMOVAL = Plan(LAYERS, (1, 3))
PLANS = {
    "remove": REMOVAL,
    "layer": Plan(LAYERS, (1, 2, 3), "layer"),
    "mlp": Plan(LAYERS, (1, 2, 3), "mlp"),
    "mlp-first": Plan(LAYERS, (0, 1), "mlp"),
    "skipped": Plan(LAYERS, (), skipped=((0, "attention"), (2, "mlp"), (3, "attention"), (3, "mlp"))),
    "skipped-and-removed": Plan(LAYERS, (1,), skipped=((0, "mlp"), (2, "attention"), (4, "mlp"))),
}


def literal_similarity(model: PreTrainedModel, ids: torch.Tensor) -> dict[tuple[int, int], float]:
    """The mean over tokens of cos(h_i, h_j) for all i < j, computed token by token, before any final norm."""
    stream: list[torch.Tensor] = []
    layers = decoder_layers(model, architecture_of(model.config))

    def keep_input(_: object, args: tuple[torch.Tensor, ...], kwargs: dict[str, torch.Tensor]) -> None:
        stream.append((args[0] if args else kwargs["hidden_states"]).double())

    def keep_output(_: object, args: object, output: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
        stream.append((output[0] if isinstance(output, tuple) else output).double())

    hooks = [layers[i].register_forward_pre_hook(keep_input, with_kwargs=True) for i in range(LAYERS)]
    hooks.append(layers[LAYERS - 1].register_forward_hook(keep_output))
    logits(model, ids)
    for hook in hooks:
        hook.remove()
    similarity: dict[tuple[int, int], float] = {}
    for i, j in itertools.combinations(range(LAYERS + 1), 2):
        pairs = zip(stream[i].flatten(0, 1), stream[j].flatten(0, 1), strict=True)
        cosines = [float(a @ b / (a.norm() * b.norm())) for a, b in pairs]
        similarity[i, j] = sum(cosines) / len(cosines)
    return similarity


@pytest.mark.parametrize("architecture", ALL)
def test_scores_are_those_of_the_raw_residual_stream(architecture: str) -> None:
    model, ids = tiny_model(architecture), token_ids(3, 20)
    scores, literal = measure_scores(model, Windows(ids, "random")), literal_similarity(model, ids)
    for (i, j), similarity in literal.items():
        assert scores.similarity[i][j] == pytest.approx(similarity, abs=1e-6)
        if j == i + 1:
            assert scores.block_influence[i] == pytest.approx(1 - similarity, abs=1e-6)


@pytest.mark.parametrize("replacement", ["none", "layer"])
@pytest.mark.parametrize("architecture", ALL)
def test_llm_streamline_takes_the_block_of_most_alike_input_and_output(architecture: str, replacement: str) -> None:
    model, windows = tiny_model(architecture), Windows(token_ids(3, 20), "random")
    literal, inputs = (
        literal_similarity(model, windows.ids),
        MethodInputs(model, windows, measure_scores(model, windows)),
    )
    for remove in range(1, LAYERS):
        length = remove + (replacement == "layer")
        alike = [literal[first, first + length] for first in range(LAYERS - length + 1)]
        best = alike.index(max(alike))
        recipe = make_recipe({"method": "llm-streamline", "remove": remove, "replacement": replacement})
        plan = method_of(recipe, model.config).plan(recipe, inputs)
        assert plan == Plan(LAYERS, tuple(range(best, best + length)), replacement)


# Where layers differ most, every edit is fast; on each of the others, one of them.
DIFFERENT = {"llama", "gpt2", "gemma2", "qwen3_moe"}


@pytest.mark.parametrize(
    ("architecture", "edit"),
    [
        pytest.param(
            each,
            edit,
            marks=() if each in DIFFERENT or number % len(PLANS) == place else pytest.mark.slow,
        )
        for number, each in enumerate(ALL)
        for place, edit in enumerate(PLANS)
    ],
)
def test_edit_survives_disk_stock_transformers_and_the_cache(architecture: str, edit: str, tmp_path: Path) -> None:
    model, plan, ids = tiny_model(architecture), PLANS[edit], token_ids()
    before = logits(model, ids)
    expected_config = planned_config(model.config, plan)
    apply_plan(model, plan, build_replacement(model, plan))
    assert model.config.num_hidden_layers == len(plan.new_layers)
    assert model.config.to_dict() == expected_config.to_dict()
    edited = logits(model, ids)
    assert (edited - before).abs().max() > 1e-3
    model.save_pretrained(tmp_path)

    stock = stock_model(tmp_path)
    torch.testing.assert_close(logits(stock, ids), edited, atol=1e-5, rtol=0)
    assert greedy(stock, use_cache=True) == greedy(stock, use_cache=False)

    ours = load(str(tmp_path))
    torch.testing.assert_close(logits(ours, ids), edited, atol=1e-5, rtol=0)
    assert greedy(ours, use_cache=True) == greedy(stock, use_cache=True)
    for stand_in, sublayer in ((SkippedAttention, "attention"), (SkippedMLP, "mlp")):
        skipped = {layer for layer, skip in skipped_sublayers(ours.config).items() if sublayer in skip}
        layers = decoder_layers(ours, ARCHITECTURES[architecture])
        assert skipped == {index for index, layer in enumerate(layers) if has(layer, stand_in)}
        planned = sum(kind == sublayer for _, kind in plan.skipped)
        assert len(skipped) == planned + (sublayer == "attention" and plan.replacement == "mlp")


@pytest.mark.parametrize("replacement", ["layer", "mlp"])
def test_a_replacement_layer_follows_the_models_config(replacement: str) -> None:
    model, plan, ids = tiny_model("qwen3"), Plan(LAYERS, (1, 2), replacement), token_ids()
    built = build_replacement(model, plan)
    apply_plan(model, plan, built)
    assert built.layer.self_attn.config is model.config
    expected = logits(model, ids)
    model.set_attn_implementation("eager")
    torch.testing.assert_close(logits(model, ids), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("removed", [(0, 1), (1, 2, 3), (3, 4)])
@pytest.mark.parametrize(("replacement", "skipped"), [("layer", ()), ("mlp", ("attention",))])
@pytest.mark.parametrize("architecture", ALL)
def test_a_replacement_begins_as_its_blocks_first_layer(
    architecture: str, replacement: str, skipped: tuple[str, ...], removed: tuple[int, ...]
) -> None:
    model, ids = tiny_model(architecture), token_ids()
    plan = Plan(LAYERS, removed, replacement)
    apply_plan(model, plan, build_replacement(model, plan))
    first_alone = tiny_model(architecture)
    apply_plan(
        first_alone, Plan(LAYERS, removed[1:], skipped=tuple((removed[0], sublayer) for sublayer in skipped)), None
    )
    assert model.config.to_dict() == first_alone.config.to_dict()
    torch.testing.assert_close(logits(model, ids), logits(first_alone, ids), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("replacement", "skipped"), [("layer", {}), ("mlp", {1: ["attention"]}), ("ffn", {})])
def test_a_replacement_is_not_dead_where_its_block_was(replacement: str, skipped: dict[int, list[str]]) -> None:
    model = tiny_model()
    apply_plan(model, Plan(LAYERS, (), skipped=((1, "mlp"), (4, "mlp"))), None)
    plan = Plan(LAYERS, (1, 2), replacement)
    change = apply_plan(model, plan, build_replacement(model, plan))
    # The old layer 4 is layer 3 now, and still skipped.
    assert change.skipped == skipped_sublayers(model.config) == {**skipped, 3: ["mlp"]}


@pytest.mark.parametrize("replacement", ["layer", "mlp", "linear", "ffn"])
def test_a_replacement_that_was_not_built_is_missed(replacement: str) -> None:
    model, config = tiny_model(), tiny_model().config.to_dict()
    with pytest.raises(
        StreamlineError, match=f"replacement '{replacement}': is missing; give the result of build_replacement"
    ):
        apply_plan(model, Plan(LAYERS, (1, 2), replacement), None)
    assert model.config.to_dict() == config


def has(layer: nn.Module, kind: type[nn.Module]) -> bool:
    return any(isinstance(module, kind) for module in layer.modules())


@pytest.mark.parametrize("sublayer", ["attention", "mlp"])
@pytest.mark.parametrize("architecture", ALL)
def test_a_dead_sublayer_adds_nothing(architecture: str, sublayer: str) -> None:
    model, ids, row = tiny_model(architecture), token_ids(), ARCHITECTURES[architecture]
    skipped = tiny_model(architecture)
    apply_plan(skipped, Plan(LAYERS, (), skipped=((2, sublayer),)), None)  # type: ignore[arg-type]

    def nothing(_: object, __: object, out: object) -> object:
        return (torch.zeros_like(out[0]), *out[1:]) if isinstance(out, tuple) else torch.zeros_like(out)

    layer = decoder_layers(model, row)[2]
    layer.get_submodule(row.attention if sublayer == "attention" else row.mlp[-1]).register_forward_hook(nothing)
    torch.testing.assert_close(logits(skipped, ids), logits(model, ids), atol=1e-5, rtol=0)


def test_marks_stay_with_their_layers_and_add_up() -> None:
    model = tiny_model()
    apply_plan(model, Plan(LAYERS, (), skipped=((1, "mlp"), (3, "attention"), (4, "mlp"))), None)
    change = apply_plan(model, Plan(LAYERS, (0, 4), skipped=((1, "attention"), (2, "mlp"), (3, "attention"))), None)
    assert change.skipped == skipped_sublayers(model.config) == {0: ["attention", "mlp"], 1: ["mlp"], 2: ["attention"]}


@pytest.mark.parametrize("architecture", ALL)
def test_removal_is_skipping(architecture: str) -> None:
    model, ids = tiny_model(architecture), token_ids()
    kept = tiny_model(architecture)
    apply_plan(kept, REMOVAL, None)
    # A skipped layer is one that returns what it was given.
    for index in REMOVAL.removed:
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
    with pytest.raises(StreamlineError, match=r"'bert': is not supported; supported are arcee, .*qwen3"):
        architecture_of(BertConfig())


def test_tokens_that_see_the_future_are_refused() -> None:
    with pytest.raises(StreamlineError, match="config.use_bidirectional_attention True: each token sees those after"):
        architecture_of(tiny_model("gemma3_text", use_bidirectional_attention=True).config)


def test_layers_that_depend_on_their_number_are_refused() -> None:
    config = tiny_model("gpt2").config
    config.scale_attn_by_inverse_layer_idx = True
    with pytest.raises(
        StreamlineError, match="scale_attn_by_inverse_layer_idx True: makes layers depend on their index"
    ):
        architecture_of(config)
