"""The `quantization_config` of a model before and after layers are removed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedConfig

from console import optimum_cli
from optimum.streamline.checkpoints.loading import load
from optimum.streamline.errors import StreamlineError
from optimum.streamline.models.architectures import ARCHITECTURES
from optimum.streamline.models.quantization_config import quantization_fields, quantization_name, renumber_quantization
from optimum.streamline.models.quantized_weights import quantized_modules
from reference import LIBRARY, REFERENCE
from tiny import token_ids, wide_model


def renumber(config: PreTrainedConfig, origins: list[int], mlp_origins: list[int] | None = None) -> None:
    renumber_quantization(config, ARCHITECTURES["llama"], origins, mlp_origins or origins)


def test_lists_of_modules_follow_the_parts_of_packed_layers() -> None:
    config = wide_model().config
    names = ["model.layers.1.mlp.up_proj", "model.layers.1.self_attn", "model.layers.2", "model.layers.2.mlp"]
    names += [r"re:.*layers\.2\.mlp.*", "model.layers.2.post_attention_layernorm"]
    config.quantization_config = {"quant_method": "compressed-tensors", "ignore": names, "bits": 4}
    renumber(config, [0, 1, 4], [0, 2, 4])  # the second has the attention of layer 1 and the MLP of layer 2
    assert quantization_fields(config)["ignore"] == [
        "model.layers.1.self_attn",
        "model.layers.1.mlp",  # of the whole layer 2, this is here
        "model.layers.1.mlp",
        r"re:.*layers\.1\.mlp.*",
        "model.layers.1.post_attention_layernorm",
    ]
    config.quantization_config = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["model.layers.2.*"])
    renumber(config, [0, 1], [0, 2])
    assert quantization_fields(config)["llm_int8_skip_modules"] == [
        f"model.layers.1.mlp.{each}_proj" for each in ("gate", "up", "down")
    ]


@pytest.mark.parametrize("pattern", [r"re:.*layers\.2\..*", r"re:.*layers\.2\.m.*", r"re:.*layers\.2\.\w+\.q_proj"])
def test_a_pattern_of_a_whole_layer_cannot_follow_its_halves(pattern: str) -> None:
    config = wide_model().config
    config.quantization_config = {"quant_method": "compressed-tensors", "ignore": [pattern]}
    with pytest.raises(StreamlineError, match=r"quantization_config\.ignore: names layers in a form that cannot"):
        renumber(config, [0, 1], [0, 2])


def test_lists_of_modules_follow_the_layers() -> None:
    config = wide_model().config
    names = ["lm_head", "model.layers.1.mlp", "model.layers.3", r"re:.*layers\.4\..*proj$", "model.layers.10.mlp"]
    names.append(r"re:.*layers\.\d+\.mlp\.gate$")  # in every layer
    config.quantization_config = {"quant_method": "compressed-tensors", "ignore": names, "bits": 4}
    renumber(config, [0, 3, 4])
    expected = ["lm_head", "model.layers.1", r"re:.*layers\.2\..*proj$", names[-1]]
    assert quantization_fields(config)["ignore"] == expected


@pytest.mark.parametrize(
    "fields",
    [
        {"dynamic": {r"model\.layers\.3\.mlp": {"bits": 8}}},
        {"dynamic": {r"model\.layers\.[34]\.mlp": {"bits": 8}}},
        {"ignore": [r"re:.*layers\.[34]\..*proj$"]},
        {"ignore": [r"re:.*layers\.(3|4)\..*proj$"]},
        {"ignore": [r"re:.*layers\.3\.mlp|.*layers\.4\.mlp"]},
        {"ignore": [r"re:.*\.3\.mlp"]},
    ],
)
def test_layers_named_in_a_form_that_cannot_follow_are_refused(fields: dict[str, object]) -> None:
    config = wide_model().config
    config.quantization_config = {"quant_method": "gptq", **fields}
    [field] = fields
    said = rf"quantization_config\.{field}: names layers in a form that cannot follow their new numbers"
    with pytest.raises(StreamlineError, match=said):
        renumber(config, [0, 3])


@pytest.mark.parametrize(
    ("patterns", "now"),
    [
        (["lm_head"], ["lm_head"]),
        (["down_proj"], ["down_proj"]),  # in every layer, so the pattern still holds
        (["model.layers.1", "lm_head"], ["lm_head"]),
        (["model.layers.0.mlp.up_proj"], ["model.layers.0.mlp.up_proj"]),
        (["model.layers.[34].mlp.up_proj"], ["model.layers.1.mlp.up_proj", "model.layers.2.mlp.up_proj"]),
        (["3.mlp.up_proj"], ["model.layers.1.mlp.up_proj"]),
        ([r"model\.layers\.(1|4)\.self_attn\.[qk]_proj"], [f"model.layers.2.self_attn.{each}_proj" for each in "qk"]),
        (
            ["model.norm", "classifier"],
            ["model.norm", "classifier"],
        ),  # not linear modules
    ],
)
def test_patterns_of_bitsandbytes_choose_the_same_modules_afterwards(patterns: list[str], now: list[str]) -> None:
    config = wide_model().config
    config.quantization_config = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=patterns)
    renumber(config, [0, 3, 4])
    assert quantization_fields(config)["llm_int8_skip_modules"] == now


def test_four_bits_without_a_type_are_those_of_the_library() -> None:
    config = wide_model().config
    config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    assert quantization_name(config) == "bnb-fp4"


@pytest.mark.quantizers
def test_a_stock_checkpoint_with_patterns_is_pruned(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    wide_model(vocab_size=4096).save_pretrained(tmp_path / "float")
    skipped = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["lm_head", "model.layers.[34].*"])
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=skipped)
    stock.save_pretrained(tmp_path / "stock")
    AutoTokenizer.from_pretrained(REFERENCE).save_pretrained(tmp_path / "stock")
    words = ("prune", "-m", tmp_path / "stock", tmp_path / "p", "--layers", "1,2")
    words += (*LIBRARY["prune"], "--samples", "2", "--length", "16")
    done = optimum_cli(monkeypatch, capsys, "streamline", *words)
    assert (done.code, done.err) == (0, "")
    model = load(str(tmp_path / "p"))
    assert {name.split(".")[2] for name in quantized_modules(model)} == {"0"}
    before, after = load(str(tmp_path / "stock")), model
    for old, new in ((0, 0), (3, 1), (4, 2)):
        name = "model.layers.{}.mlp.up_proj"
        one, other = before.get_submodule(name.format(old)), after.get_submodule(name.format(new))
        assert torch.equal(one.weight, other.weight)
    assert model(token_ids()).logits.isfinite().all()
