"""Merging adapters: the saved checkpoint computes the same as peft does with base and adapter."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from optimum.streamline.errors import StreamlineError
from optimum.streamline.model_files.adapters import merged_adapter
from optimum.streamline.model_files.weight_files import is_adapter
from reference import REFERENCE
from tiny import LAYERS, VOCABULARY, tiny_model, token_ids

# peft warns that tied or resized embeddings need care, and that weights are missing. Both are intended here.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft.*")
IDS = token_ids()
TIED = {"tie_word_embeddings": True}


def adapted(base: Path | str, added_tokens: int = 0, kind: str = "LORA", **fields: Any) -> PeftModel:
    """The base with an adapter whose weights are all different from their initial values."""
    model = AutoModelForCausalLM.from_pretrained(base)
    if added_tokens:
        model.resize_token_embeddings(VOCABULARY + added_tokens)
    torch.manual_seed(0)
    config = peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(kind)]
    model = get_peft_model(model, config(task_type="CAUSAL_LM", **{"target_modules": ["q_proj", "up_proj"], **fields}))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def save_adapter(model: PeftModel, folder: Path, **fields: Any) -> Path:
    model.save_pretrained(folder)
    change_config(folder, **fields)
    return folder


def change_config(folder: Path, **fields: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(input_ids=IDS).logits
    return found


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.fixture
def tiny_adapter(tmp_path: Path) -> Path:
    tiny_model().save_pretrained(tmp_path / "base")
    return save_adapter(
        adapted(tmp_path / "base"), tmp_path / "adapter", base_model_name_or_path=str(tmp_path / "base")
    )


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside a full model"])
def test_it_computes_what_peft_does(beside: bool, tmp_path: Path) -> None:
    folder, base, named = tmp_path / "adapter", tmp_path / "base", str(tmp_path / "base")
    AutoModelForCausalLM.from_pretrained(REFERENCE, dtype=torch.float32).save_pretrained(base)
    AutoTokenizer.from_pretrained(REFERENCE).save_pretrained(base)
    if beside:  # then the base is in this folder, even if the adapter names another
        shutil.copytree(base, folder)
        named = "nobody/nothing"
    model = adapted(base)
    save_adapter(model, folder, base_model_name_or_path=named)
    assert is_adapter(folder)
    assert not is_adapter(base)
    assert merged_adapter(folder, tmp_path / "out")[0] == (str(folder) if beside else named)
    assert not is_adapter(tmp_path / "out")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    unchanged = logits(AutoModelForCausalLM.from_pretrained(base))
    assert (logits(merged) - unchanged).abs().max() > 0.1 * unchanged.abs().max()
    assert_same(logits(merged), logits(model))
    text = "def f(x):\n    return x"
    read, expected = (AutoTokenizer.from_pretrained(place) for place in (tmp_path / "out", REFERENCE))
    assert read(text)["input_ids"] == expected(text)["input_ids"]
    assert json.loads((tmp_path / "out" / "config.json").read_text())[
        "rope_theta"
    ]  # the field that transformers 4 reads


@pytest.mark.parametrize(
    ("base", "fields"),
    [
        ({}, {"target_modules": "all-linear", "use_dora": True}),
        ({}, {"target_modules": "all-linear", "init_lora_weights": "pissa"}),
        ({"architecture": "gpt2"}, {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True, "bias": "all"}),
        ({"architecture": "mixtral"}, {"target_parameters": ["mlp.experts.gate_up_proj"]}),
        ({}, {"kind": "IA3", "target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
        ({}, {"kind": "LOHA"}),
        ({}, {"modules_to_save": ["lm_head"]}),
        (TIED, {"modules_to_save": ["embed_tokens"]}),
        (TIED, {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
        (TIED, {"target_modules": ["embed_tokens", "q_proj"]}),
        (TIED, {"trainable_token_indices": [3, 4]}),
        ({}, {"added_tokens": 5}),
        (TIED, {"added_tokens": 5}),
        ({}, {"added_tokens": 5, "modules_to_save": ["embed_tokens", "lm_head"]}),
    ],
)
def test_so_do_other_kinds_and_adapters_of_embeddings(
    base: dict[str, Any], fields: dict[str, Any], tmp_path: Path
) -> None:
    tiny_model(**base).save_pretrained(tmp_path / "base")
    model = adapted(tmp_path / "base", **fields)
    save_adapter(model, tmp_path / "adapter", base_model_name_or_path=str(tmp_path / "base"))
    merged_adapter(tmp_path / "adapter", tmp_path / "out")
    unchanged = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    found = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    assert found.shape[-1] == VOCABULARY + fields.get("added_tokens", 0)
    assert (found[..., :VOCABULARY] - unchanged).abs().max() > 0.01 * unchanged.abs().max()
    assert_same(found, logits(model))


def test_its_own_tokenizer_goes_before_that_of_its_base(tiny_adapter: Path, tmp_path: Path) -> None:
    own = AutoTokenizer.from_pretrained(REFERENCE)
    own.save_pretrained(tmp_path / "base")
    own.add_tokens(["<extra>"])
    own.save_pretrained(tiny_adapter)
    merged_adapter(tiny_adapter, tmp_path / "out")
    assert "<extra>" in AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab()


def test_it_is_stored_in_the_dtype_of_its_base(tiny_adapter: Path, tmp_path: Path) -> None:
    tiny_model().to(torch.bfloat16).save_pretrained(tmp_path / "base")
    merged_adapter(tiny_adapter, tmp_path / "out")
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def cut_weights(adapter: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-50])


def leave_one_out(adapter: Path) -> None:
    weights = load_file(adapter / "adapter_model.safetensors")
    del weights[min(weights)]
    save_file(weights, adapter / "adapter_model.safetensors")


def make_pickle(adapter: Path) -> None:
    weights = load_file(adapter / "adapter_model.safetensors")
    torch.save(weights, adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()


def other_base(**fields: Any) -> Callable[[Path], None]:
    def change(adapter: Path) -> None:
        shutil.rmtree(adapter.parent / "base")
        tiny_model(**fields).save_pretrained(adapter.parent / "base")

    return change


def quantized_base(adapter: Path) -> None:
    file = adapter.parent / "base" / "config.json"
    quantization = BitsAndBytesConfig(load_in_8bit=True).to_dict()
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": quantization}))


def config(**fields: Any) -> Callable[[Path], None]:
    return lambda adapter: change_config(adapter, **fields)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (config(base_model_name_or_path="/no/such"), "its base '/no/such' does not exist; write the folder or Hub id"),
        (config(base_model_name_or_path=None), "adapter_config.json names no base_model_name_or_path; write it there"),
        (config(base_model_name_or_path=3), "names no base_model_name_or_path"),
        (
            lambda adapter: change_config(adapter, base_model_name_or_path=str(adapter)),
            "is an adapter; merge that first",
        ),
        (config(peft_type="PROMPT_TUNING"), "peft_type PROMPT_TUNING changes no weights, and cannot be merged"),
        (config(peft_type="NEWEST"), "adapter_config.json names no peft_type that this peft knows"),
        (config(peft_type=["LORA"]), "names no peft_type"),
        (config(r=4), "cannot be loaded on its base .*size mismatch"),
        (config(target_modules=["nothing"]), "cannot be loaded on its base .*Target modules"),
        (config(alora_invocation_tokens=[1]), "peft cannot merge this LORA"),
        (config(layer_replication=[[0, LAYERS], [0, 1]]), "its weights do not match the layers of its base"),
        (lambda adapter: (adapter / "adapter_config.json").write_text("{"), "names no peft_type"),
        (cut_weights, "adapter_model.safetensors cannot be read"),
        (make_pickle, "has no adapter_model.safetensors; save the adapter in safetensors, a pickle is not read"),
        (leave_one_out, "its weights do not match the layers of its base, first 'base_model.model.model.layers.0"),
        (other_base(hidden_size=64), "cannot be loaded on its base .*size mismatch"),
        (other_base(num_hidden_layers=3), "its weights do not match the layers of its base"),
        (other_base(num_hidden_layers=7), "its weights do not match the layers of its base"),
        (lambda adapter: (adapter.parent / "base" / "model.safetensors").unlink(), "its base .* cannot be loaded"),
        (lambda adapter: (adapter / "tokenizer.json").write_text("{"), "its tokenizer cannot be read"),
        pytest.param(quantized_base, "is quantized; name the float model", marks=pytest.mark.quantizers),
    ],
)
def test_what_cannot_be_merged_is_one_line(
    change: Callable[[Path], None], message: str, tiny_adapter: Path, tmp_path: Path
) -> None:
    change(tiny_adapter)
    with pytest.raises(StreamlineError, match=f"^adapter .*{message}") as caught:
        merged_adapter(tiny_adapter, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert str(tiny_adapter) in str(caught.value)
    assert not (tmp_path / "out").exists()
