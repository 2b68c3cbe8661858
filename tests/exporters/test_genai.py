"""The folder in onnxruntime-genai, unchanged, and a pruned checkpoint in its builder."""

import json
import subprocess
import sys

import numpy as np
import onnxruntime_genai as genai
import pytest
import torch
from transformers import AutoTokenizer

from reference import REFERENCE
from tiny import token_ids

pytestmark = pytest.mark.onnx

NEW_TOKENS = 12
CODE = '''    def read(self, path, encoding="utf-8"):
        """Return the text of a file."""
        with open(path, encoding=encoding) as stream:
            return '''


def greedy(folder, prompt):
    parameters = genai.GeneratorParams(model := genai.Model(str(folder)))
    length = len(prompt) + NEW_TOKENS
    parameters.set_search_options(max_length=length, min_length=length)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(np.array([prompt], dtype=np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return generator.get_sequence(0).tolist()


def greedy_in_torch(model, prompt):
    prompt = torch.tensor([prompt])
    attend_to_all = torch.ones_like(prompt)
    lengths = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
    return model.generate(prompt, attention_mask=attend_to_all, do_sample=False, **lengths)[0].tolist()


@pytest.mark.parametrize("case", ["llama", "dead first", "dead middle", "gpt2", "opt"])
def test_greedy_tokens_are_those_of_torch(exported, case):
    export = exported(case)
    prompt = token_ids(1, 9, seed=3)[0].tolist()
    assert greedy(export.folder, prompt) == greedy_in_torch(export.stock(), prompt)


def test_a_pruned_trained_model_writes_what_it_writes_in_torch(pruned_reference):
    prompt = AutoTokenizer.from_pretrained(REFERENCE).encode(CODE)
    expected = greedy_in_torch(pruned_reference.stock(), prompt)
    assert len(set(expected[len(prompt) :])) > 2  # or it repeats itself, and equality says little
    assert greedy(pruned_reference.folder, prompt) == expected


def test_its_builder_takes_a_pruned_checkpoint(pruned_reference, tmp_path):
    builder = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-p", "fp32", "-e", "cpu"]
    command = [*builder, "-m", str(pruned_reference.checkpoint), "-o", str(tmp_path / "built")]
    subprocess.run(command, check=True, capture_output=True)
    prompt = AutoTokenizer.from_pretrained(REFERENCE).encode(CODE)
    assert greedy(tmp_path / "built", prompt) == greedy_in_torch(pruned_reference.stock(), prompt)


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


def test_its_tokenizer_is_that_of_the_checkpoint(exported):
    export = exported("llama")
    text = "the other path = {a: 1}\n"
    tokenizer = genai.Tokenizer(genai.Model(str(export.folder)))
    expected = AutoTokenizer.from_pretrained(export.checkpoint).encode(text)
    assert tokenizer.encode(text).tolist() == expected
    assert tokenizer.decode(expected) == text
