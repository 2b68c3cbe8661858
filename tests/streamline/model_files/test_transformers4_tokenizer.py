"""A saved tokenizer gives the same tokens in transformers 4, with its fewer classes and fields, and transformers 5."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from tokenizers import processors
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

import tokenizer_seen
from console import optimum_cli
from optimum.streamline.checkpoints.loading import load_tokenizer
from optimum.streamline.model_files.source import ModelSource
from optimum.streamline.model_files.transformers4_tokenizer import save_tokenizer
from optimum.streamline.models.architectures import ARCHITECTURES
from small_tokenizers import MAKERS, NOT_OLDER, byte_level, write_tokenizer
from tiny import tiny_model
from tokenizer_seen import seen

# The class of each tokenizer for which transformers 5 has a class of its own.
CLASSES = {
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text"), "GemmaTokenizer"),
    **dict.fromkeys(("gpt2", "gpt2 in two files", "opt", "opt in two files", "starcoder2", "exaone4"), "GPT2Tokenizer"),
    **dict.fromkeys(("llama", "llama without BOS", "llama of a fast class"), "LlamaTokenizer"),
    **dict.fromkeys(("qwen2", "qwen3", "qwen3_moe"), "Qwen2Tokenizer"),
    "gpt_neox": "GPTNeoXTokenizer",
}


def saved_as_we_do(source: Path, folder: Path) -> Path:
    folder.mkdir(parents=True)
    save_tokenizer(load_tokenizer(ModelSource(str(source))), folder)
    shutil.copy(source / "config.json", folder)
    return folder


def fields_of(folder: Path) -> dict[str, Any]:
    fields: dict[str, Any] = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    return fields


def test_every_architecture_has_one() -> None:
    assert {name.split()[0] for name in MAKERS} == set(ARCHITECTURES)


@pytest.mark.parametrize("name", MAKERS)
def test_what_was_saved_is_the_same_tokenizer_to_transformers_5(name: str, tmp_path: Path) -> None:
    source = write_tokenizer(name, tmp_path / "source")
    saved = saved_as_we_do(source, tmp_path / "saved")
    before = seen(str(source))
    assert seen(str(saved)) == before
    assert seen(str(saved_as_we_do(saved, tmp_path / "again"))) == before
    fields = fields_of(saved)
    assert fields["tokenizer_class"] == CLASSES.get(name, "PreTrainedTokenizerFast")
    assert not {"backend", "is_local", "local_files_only", "model_specific_special_tokens"} & fields.keys()
    assert not isinstance(fields.get("extra_special_tokens"), list)


def test_special_tokens_have_their_older_names(tmp_path: Path) -> None:
    source = write_tokenizer("llama with a token of its own", tmp_path / "source")
    fields = fields_of(saved_as_we_do(source, tmp_path / "saved"))
    assert fields["additional_special_tokens"] == ["<|tool|>"]
    assert fields["extra_special_tokens"] == {"image_token": "<|image|>"}


def test_what_its_class_does_not_add_is_left_to_the_file(tmp_path: Path) -> None:
    source = write_tokenizer("gpt2", tmp_path / "source")
    tokenizer = load_tokenizer(ModelSource(str(source)))
    tokens = [("!", tokenizer.convert_tokens_to_ids("!"))]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("! $A", "! $A $B", tokens)
    save_tokenizer(tokenizer, tmp_path)
    assert fields_of(tmp_path)["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_a_tokenizer_in_python_keeps_its_class(tmp_path: Path) -> None:
    save_tokenizer(ByT5Tokenizer(extra_ids=2), tmp_path)
    fields = fields_of(tmp_path)
    assert fields["tokenizer_class"] == "ByT5Tokenizer"
    assert len(fields["additional_special_tokens"]) == 2
    assert ByT5Tokenizer.from_pretrained(tmp_path)("a é")["input_ids"] == ByT5Tokenizer(extra_ids=2)("a é")["input_ids"]


def test_code_of_its_own_keeps_its_class(tmp_path: Path) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level("<s>"), bos_token="<s>")
    tokenizer._auto_map = {"AutoTokenizer": ["code.Own", None]}
    save_tokenizer(tokenizer, tmp_path)
    assert fields_of(tmp_path)["tokenizer_class"] == "TokenizersBackend"


def test_a_pruned_checkpoint_has_such_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = write_tokenizer("llama of version 3", tmp_path / "source"), tmp_path / "out"
    tiny_model(vocab_size=400).save_pretrained(source)
    words = ("prune", "-m", source, out, "--layers", 3, "--calibration", "stdlib", "--length", 8)
    outcome = optimum_cli(monkeypatch, capsys, "streamline", *words)
    assert outcome.code == 0, outcome.err
    assert fields_of(out)["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert fields_of(out)["additional_special_tokens"] == ["<|tool|>"]


@pytest.mark.slow
@pytest.mark.parametrize("saved_by", ["nobody", "transformers 4", "transformers 5"])
def test_transformers_4_reads_the_same_tokenizer(saved_by: str, optimum_onnx: str, tmp_path: Path) -> None:
    names = [name for name in MAKERS if saved_by != "transformers 4" or name not in NOT_OLDER]
    sources = {name: write_tokenizer(name, tmp_path / "source" / name) for name in names}
    if saved_by == "transformers 4":
        subprocess.run([optimum_onnx, tokenizer_seen.__file__, "--save", *map(str, sources.values())], check=True)
    if saved_by == "transformers 5":
        for folder in sources.values():
            tokenizer_seen.save(str(folder))
    saved = {str(saved_as_we_do(sources[name], tmp_path / "saved" / name)): name for name in names}
    words = [optimum_onnx, tokenizer_seen.__file__, *saved]
    older = json.loads(subprocess.run(words, check=True, stdout=subprocess.PIPE).stdout)
    for folder, name in saved.items():
        assert older[folder] == seen(folder) == seen(str(sources[name])), name
