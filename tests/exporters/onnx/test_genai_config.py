"""Tests that onnxruntime-genai runs an export unchanged, and that its model builder takes a pruned checkpoint."""

import json
import shutil
import subprocess
import sys

import numpy as np
import onnx_ir as ir
import onnxruntime_genai as genai
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum.exporters.streamline.onnx.genai_config import write_genai_config
from optimum.exporters.streamline.onnx.last_logits import keep_last_logits
from optimum.streamline.checkpoints.loading import load_stock, load_tokenizer
from optimum.streamline.checkpoints.saving import save_model
from optimum.streamline.editing.apply import apply_plan
from optimum.streamline.editing.plan import packed_plan
from optimum.streamline.model_files.source import ModelSource
from reference import REFERENCE
from tiny import token_ids

pytestmark = pytest.mark.onnx

NEW_TOKENS = 12
CODE = '''    def read(self, path, encoding="utf-8"):
        """Return the text of a file."""
        with open(path, encoding=encoding) as stream:
            return '''


def greedy(folder, *prompts):
    """The new tokens of each prompt, decoded greedily; shorter prompts are padded on the right, as GenAI does."""
    parameters = genai.GeneratorParams(model := genai.Model(str(folder)))
    longest = max(map(len, prompts))
    lengths = {"max_length": longest + NEW_TOKENS, "min_length": longest + NEW_TOKENS}
    parameters.set_search_options(batch_size=len(prompts), **lengths)
    pad = json.loads((folder / "genai_config.json").read_text())["model"]["pad_token_id"]
    generator = genai.Generator(model, parameters)
    generator.append_tokens(np.array([prompt + [pad] * (longest - len(prompt)) for prompt in prompts], dtype=np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return [generator.get_sequence(row).tolist()[longest:] for row in range(len(prompts))]


def greedy_in_torch(model, prompt):
    prompt = torch.tensor([prompt])
    attend_to_all = torch.ones_like(prompt)
    lengths = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
    return model.generate(prompt, attention_mask=attend_to_all, do_sample=False, **lengths)[
        0, prompt.shape[1] :
    ].tolist()


@pytest.mark.parametrize(
    "case",
    ["llama", "dead middle", *(pytest.param(case, marks=pytest.mark.slow) for case in ("dead first", "gpt2", "opt"))],
)
def test_greedy_tokens_are_those_of_torch(exported, case):
    export = exported(case)
    prompt = token_ids(1, 9, seed=3)[0].tolist()
    assert greedy(export.folder, prompt) == [greedy_in_torch(export.stock(), prompt)]


def test_a_pruned_trained_model_writes_what_it_writes_in_torch(pruned_reference):
    prompt = AutoTokenizer.from_pretrained(REFERENCE).encode(CODE)
    expected = greedy_in_torch(pruned_reference.stock(), prompt)
    assert len(set(expected)) > 2  # a model that repeats one token would make the comparison weak
    assert greedy(pruned_reference.folder, prompt) == [expected]


@pytest.mark.parametrize("last_only", [False, True])
def test_prompts_of_mixed_lengths_in_one_batch(pruned_reference, tmp_path, last_only):
    tokenizer, folder = AutoTokenizer.from_pretrained(REFERENCE), tmp_path / "onnx"
    shutil.copytree(pruned_reference.folder, folder)
    if last_only:
        keep_last_logits(folder, pruned_reference.stock().config.hidden_size)
    prompts = [tokenizer.encode(text) for text in (CODE, "import os\nfor name in ", "class Reader:\n")]
    assert len(set(map(len, prompts))) == 3
    assert greedy(folder, *prompts) == [greedy_in_torch(pruned_reference.stock(), prompt) for prompt in prompts]


@pytest.mark.slow
@pytest.mark.parametrize("edit", ["layers removed", "packed"])
def test_its_builder_takes_a_pruned_checkpoint(pruned_reference, tmp_path, edit):
    checkpoint = pruned_reference.checkpoint
    if edit == "packed":
        model = load_stock(ModelSource(REFERENCE), torch.float32)
        apply_plan(model, packed_plan(16, [(4, "mlp"), (5, "attention"), (10, "mlp"), (11, "attention")]), None)
        save_model(model, load_tokenizer(ModelSource(REFERENCE)), torch.float32, checkpoint := tmp_path / "packed")
    builder = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-p", "fp32", "-e", "cpu"]
    command = [*builder, "-m", str(checkpoint), "-o", str(tmp_path / "built")]
    subprocess.run(command, check=True, capture_output=True)
    prompt = AutoTokenizer.from_pretrained(REFERENCE).encode(CODE)
    stock = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    assert greedy(tmp_path / "built", prompt) == [greedy_in_torch(stock, prompt)]


def test_the_config_counts_the_layers_that_have_a_cache(exported):
    export = exported("dead middle")
    config = json.loads((export.folder / "genai_config.json").read_text())
    assert export.stock().config.num_hidden_layers == 3
    decoder = config["model"]["decoder"]
    assert {key: decoder[key] for key in decoder if key.startswith("num_") or key.endswith("_size")} == {
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_size": 8,
        "hidden_size": 32,
    }
    assert config["search"]["past_present_share_buffer"] is False
    assert (config["model"]["eos_token_id"], config["model"]["pad_token_id"]) == (0, 1)


@pytest.mark.parametrize(("pad", "written"), [(0, 0), (None, 2)])
def test_padding_has_its_own_token_even_if_its_id_is_0(exported, tmp_path, pad, written):
    export = exported("llama")
    model = export.stock()
    for config in (model.config, model.generation_config):
        config.pad_token_id, config.eos_token_id = pad, [2, 3]
    write_genai_config(model, ir.load(export.folder / "model.onnx"), tmp_path)
    assert json.loads((tmp_path / "genai_config.json").read_text())["model"]["pad_token_id"] == written


def test_its_tokenizer_is_that_of_the_checkpoint(exported):
    export = exported("llama")
    text = "the other path = {a: 1}\n"
    tokenizer = genai.Tokenizer(genai.Model(str(export.folder)))
    expected = AutoTokenizer.from_pretrained(export.checkpoint).encode(text)
    assert tokenizer.encode(text).tolist() == expected
    assert tokenizer.decode(expected) == text
