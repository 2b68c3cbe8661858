"""Bare layers: what they compute, how they are saved, and which programs can load them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from behaviour import greedy, logits
from console import optimum_cli
from optimum.streamline.checkpoints.loading import load, load_stock, load_tokenizer, read_config
from optimum.streamline.editing.apply import apply_plan, build_replacement, planned_config
from optimum.streamline.editing.plan import Plan
from optimum.streamline.errors import StreamlineError
from optimum.streamline.evaluation.theoretical_cost import cost_of
from optimum.streamline.evaluation.validate import compared_models_of, validate
from optimum.streamline.model_files.source import ModelSource, fingerprint
from optimum.streamline.models.architectures import ARCHITECTURES, architecture_of, decoder_layers
from optimum.streamline.models.bare_layers import bare_layers, save_bare
from optimum.streamline.models.skipped_sublayers import ATTENTION, mark_skipped, zero_output
from optimum.streamline.pipeline.preflight import check_recipe
from optimum.streamline.pipeline.prune import prune
from optimum.streamline.recipe.healing import Healing
from optimum.streamline.recipe.parsing import make_recipe
from optimum.streamline.recipe.recipe import Budget, Calibration, Pruning, Recipe
from optimum.streamline.text.windows import Windows
from reference import LIBRARY, REFERENCE
from tiny import LAYERS, every, tiny_model, token_ids

ALL = sorted(ARCHITECTURES)
KINDS = ("ffn", "swiglu")
# The config fields that set the inner width of each host's MLPs. GPT-2's default is four times the hidden width.
INNER = {"gpt2": 4 * 32}


def bare_model(architecture: str = "llama", kind: str = "ffn", removed: tuple[int, ...] = (1, 2, 3)) -> PreTrainedModel:
    model, plan = tiny_model(architecture), Plan(LAYERS, removed, kind)
    apply_plan(model, plan, build_replacement(model, plan))
    return model


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen3"])
def test_layers_compute_the_papers_formulas_and_nothing_else(architecture: str) -> None:
    stream = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(0))
    x = stream.double()
    ffn = build_replacement(tiny_model(architecture), Plan(LAYERS, (1, 2), "ffn")).layer
    weights = {name: value.double() for name, value in ffn.state_dict().items()}
    assert {name: tuple(value.shape) for name, value in weights.items()} == {
        "up_proj.weight": (128, 32), "up_proj.bias": (128,), "down_proj.weight": (32, 128), "down_proj.bias": (32,),
    }  # fmt: skip
    inner = x @ weights["up_proj.weight"].T + weights["up_proj.bias"]
    expected = inner.clamp(min=0) @ weights["down_proj.weight"].T + weights["down_proj.bias"]
    torch.testing.assert_close(ffn(stream, None, attention_mask=None).double(), expected, atol=1e-5, rtol=0)

    swiglu = build_replacement(tiny_model(architecture), Plan(LAYERS, (1, 2), "swiglu")).layer
    weights = {name: value.double() for name, value in swiglu.state_dict().items()}
    width = INNER.get(architecture, 48)
    assert {name: tuple(value.shape) for name, value in weights.items()} == {
        "gate_proj.weight": (width, 32), "up_proj.weight": (width, 32), "down_proj.weight": (32, width),
    }  # fmt: skip
    gate = x @ weights["gate_proj.weight"].T
    expected = (gate / (1 + (-gate).exp()) * (x @ weights["up_proj.weight"].T)) @ weights["down_proj.weight"].T
    torch.testing.assert_close(swiglu(hidden_states=stream, use_cache=True).double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_random_weights_come_from_the_seed_alone(kind: str) -> None:
    model, plan = tiny_model(), Plan(LAYERS, (1, 2), kind)
    state = torch.get_rng_state()
    first, again, other = (build_replacement(model, plan, seed=seed).layer.state_dict() for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", every())
def test_structure_disk_and_cache(architecture: str, kind: str, tmp_path: Path) -> None:
    removed = (0, 1) if kind == "swiglu" else (1, 2, 3)
    planned = planned_config(tiny_model(architecture).config, Plan(LAYERS, removed, kind))
    model, ids = bare_model(architecture, kind, removed), token_ids()
    assert bare_layers(model.config) == {removed[0]: kind}
    assert model.config.to_dict() == planned.to_dict()
    edited = logits(model, ids)
    save_bare(model, tmp_path)

    again = load_stock(ModelSource(str(tmp_path)))
    torch.testing.assert_close(logits(again, ids), edited, atol=1e-6, rtol=0)
    ours = load(str(tmp_path))
    torch.testing.assert_close(logits(ours, ids), edited, atol=1e-6, rtol=0)
    assert greedy(ours, use_cache=True) == greedy(ours, use_cache=False)
    live = [
        layer for index, layer in enumerate(decoder_layers(ours, architecture_of(ours.config))) if index != removed[0]
    ]
    attentions = [layer.get_submodule(architecture_of(ours.config).attention) for layer in live]
    assert len({attention.layer_idx for attention in attentions}) == len(live)

    cost = cost_of(read_config(ModelSource(str(tmp_path))), "fp32")
    assert cost.parameters == cost.live_parameters == model.num_parameters()
    assert (cost.layers, cost.attention_layers) == (LAYERS - len(removed) + 1, LAYERS - len(removed))


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen3"])
def test_stock_transformers_refuses_it_whichever_way_it_is_asked(architecture: str, tmp_path: Path) -> None:
    model = bare_model(architecture)
    save_bare(model, tmp_path)
    for stock in (AutoConfig, AutoModelForCausalLM):
        with pytest.raises(ValueError, match="model type `streamline` but Transformers does not recognize"):
            stock.from_pretrained(tmp_path)
    with pytest.raises(OSError, match="no file named model.safetensors"):
        type(model).from_pretrained(tmp_path)


def test_a_loaded_model_is_saved_as_it_was_and_needs_no_remote_code(tmp_path: Path) -> None:
    model = bare_model("mixtral")
    save_bare(model, tmp_path / "first")
    load(str(tmp_path / "first"), trust_remote_code=False).save_pretrained(tmp_path / "second", max_shard_size="50KB")
    load(str(tmp_path / "second")).save_pretrained(tmp_path / "third")
    assert fingerprint(ModelSource(str(tmp_path / "first"))) == fingerprint(ModelSource(str(tmp_path / "third")))
    assert fingerprint(ModelSource(str(tmp_path / "first"))) != fingerprint(ModelSource(str(tmp_path / "second")))
    assert (tmp_path / "second" / "model.safetensors.index.streamline.json").is_file()
    fields = json.loads((tmp_path / "third" / "config.json").read_text())
    assert fields["model_type"] == "streamline"
    assert fields["architectures"] == ["StreamlineForCausalLM"]
    assert (fields["host_model_type"], fields["host_architectures"]) == ("mixtral", ["MixtralForCausalLM"])
    assert fields["bare_layers"] == {"1": "ffn"}


def test_dead_attentions_and_bare_layers_stand_side_by_side(tmp_path: Path) -> None:
    model = tiny_model("qwen2")
    row = architecture_of(model.config)
    zero_output(decoder_layers(model, row)[0], row, ATTENTION)
    mark_skipped(model.config, {0: [ATTENTION]})
    plan = Plan(LAYERS, (1, 2), "ffn")
    apply_plan(model, plan, build_replacement(model, plan))
    edited = logits(model, token_ids())
    save_bare(model, tmp_path)
    ours = load(str(tmp_path))
    torch.testing.assert_close(logits(ours, token_ids()), edited, atol=1e-5, rtol=0)
    assert greedy(ours, use_cache=True) == greedy(ours, use_cache=False)
    cost = cost_of(read_config(ModelSource(str(tmp_path))), "fp32")
    assert (cost.layers, cost.attention_layers) == (4, 2)


@pytest.mark.parametrize("named", [{"1": "mlp"}, {"9": "ffn"}])
def test_a_config_that_names_what_is_not_there_is_refused(named: dict[str, str], tmp_path: Path) -> None:
    save_bare(bare_model(), tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**fields, "bare_layers": named}))
    with pytest.raises(StreamlineError, match=r"bare_layers\[\d\] is '\w+': must be 'ffn' or 'swiglu', of layer 0 to"):
        read_config(ModelSource(str(tmp_path)))
    (tmp_path / "config.json").write_text(json.dumps({**fields, "bare_layers": {"0": "ffn"}}))
    with pytest.raises(StreamlineError, match="are missing in its files"):
        load(str(tmp_path))


def test_such_a_model_is_not_pruned_again(tmp_path: Path) -> None:
    model = bare_model()
    with pytest.raises(StreamlineError, match="prune its original"):
        apply_plan(model, Plan(3, (1,)), None)
    save_bare(model, tmp_path)
    with pytest.raises(StreamlineError, match="prune its original"):
        check_recipe(ModelSource(str(tmp_path)), make_recipe({"remove": 1, "length": 16}))


@pytest.mark.usefixtures("untimed")
def test_validation_measures_it(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "original")
    save_bare(bare_model(), tmp_path / "candidate")
    compared_models = compared_models_of(ModelSource(str(tmp_path / "original")), [str(tmp_path / "candidate")])
    text = Windows(token_ids(6, 40), "random")
    report = validate(compared_models, text, Budget(), rounds=2, prompt_length=16, decode_tokens=4)
    assert report.rows[1].kl.value > 0
    assert (report.rows[1].layers, report.rows[1].attention_layers) == (3, 2)
    assert report.rows[1].parameters == report.rows[1].live_parameters == bare_model().num_parameters()
    assert report.rows[1].disk_bytes > 4 * report.rows[1].parameters


def test_commands_and_the_card_say_what_loads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, said = ModelSource(REFERENCE), []
    recipe = Recipe(
        pruning=Pruning(method="llm-streamline", remove=2, replacement="ffn"),
        healing=Healing(tokens=1024, epochs=1, data="stdlib"),
        calibration=Calibration(data="stdlib", samples=4),
        length=64,
    )
    out = tmp_path / "out"
    record = prune(source, recipe, out, overwrite=False, verbose=False, notify=said.append)
    assert any("needs optimum.streamline.load" in line for line in said)
    assert "ffn" in [place.kind for place in record.change.new_layers]
    card = (out / "README.md").read_text()
    assert "from optimum.streamline import load" in card
    assert "AutoModelForCausalLM" not in card
    assert "needs optimum.streamline.load" in card
    assert load(str(out)).config.num_hidden_layers == 14
    assert AutoTokenizer.from_pretrained(out).vocab_size == load_tokenizer(ModelSource(str(out))).vocab_size
    few = (*LIBRARY["score"], "--samples", 4, "--length", 64)
    scored = optimum_cli(monkeypatch, capsys, "streamline", "score", "-m", out, *few)
    assert scored.code == 0
    assert "needs optimum.streamline.load" in " ".join(scored.out.split())
    refused = optimum_cli(monkeypatch, capsys, "streamline", "prune", "-m", out, tmp_path / "again", "--remove", 1)
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert "prune its original" in refused.err
