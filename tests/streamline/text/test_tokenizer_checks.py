"""Tokenizers that give no tokens, mostly unknown tokens, or other tokens than the original's are refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from console import Outcome, optimum_cli
from optimum.streamline.checkpoints.loading import load_tokenizer
from optimum.streamline.errors import StreamlineError
from optimum.streamline.model_files.source import ModelSource
from optimum.streamline.text.tokenizer_checks import compare_tokenizers
from optimum.streamline.text.windows import read_windows
from reference import LIBRARY, REFERENCE, VOCABULARY
from tiny import tiny_model
from tokenizers_made import rolled

Cli = Callable[..., Outcome]
TEXTS = ("def one():\n    return 1\n", "import os\n\nclass Two:\n    pass\n")


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    return lambda *words: optimum_cli(monkeypatch, capsys, "streamline", *words)


def read(tokenizer: PreTrainedTokenizerBase, spec: str = "stdlib:eval") -> None:
    read_windows(spec, tokenizer, 4, 16, 0, VOCABULARY)


def test_a_class_without_its_files_reads_nothing_and_is_refused(tmp_path: Path) -> None:
    # transformers makes a tokenizer with three tokens from this config alone.
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    tokenizer = load_tokenizer(ModelSource(str(tmp_path)))
    message = r"LlamaTokenizer of 3 tokens: makes \d+ tokens of \d+ characters of 'stdlib:eval'; it cannot read this"
    with pytest.raises(StreamlineError, match=message):
        read(tokenizer)
    rows = "".join(f"a row of a few words, the {number}th\n" for number in range(2000))
    (tmp_path / "rows.csv").write_text("text\n" + rows.replace(",", ""))
    with pytest.raises(StreamlineError, match="it cannot read this text, or its files are missing"):
        read(tokenizer, str(tmp_path / "rows.csv"))


def test_text_that_is_mostly_unknown_is_refused(tmp_path: Path) -> None:
    words = Tokenizer(models.WordLevel({"<unk>": 0, "import": 1, "return": 2, "os": 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
    with pytest.raises(StreamlineError, match=r"of 4 tokens: \d+% of 'stdlib:eval' are unknown to it \('<unk>'\)"):
        read(tokenizer)
    (tmp_path / "known.txt").write_text("import os return os, " * 100)  # one word in five is unknown
    read(tokenizer, str(tmp_path / "known.txt"))


def test_a_candidate_that_reads_otherwise_is_refused_with_the_first_difference(tmp_path: Path) -> None:
    # A vocabulary whose ids are all shifted by one.
    rolled(tmp_path)
    original = AutoTokenizer.from_pretrained(REFERENCE)
    first = original(TEXTS[0])["input_ids"][0]
    difference = rf"token 0 is \d+ \('def'\), the original's is {first} \('def'\)"
    message = rf"rolled: its tokenizer gives other tokens .* than the original's: {difference}"
    with pytest.raises(StreamlineError, match=message):
        compare_tokenizers(
            ModelSource(REFERENCE), [("same", ModelSource(REFERENCE)), ("rolled", ModelSource(str(tmp_path)))], TEXTS
        )


def test_a_candidate_that_begins_or_ends_otherwise_is_refused(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(REFERENCE)
    fields = json.loads((Path(REFERENCE) / "tokenizer.json").read_text())
    end = fields["added_tokens"][0]
    fields["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": end["content"], "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {end["content"]: {"id": end["content"], "ids": [end["id"]], "tokens": [end["content"]]}},
    }
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps(fields))
    with pytest.raises(
        StreamlineError, match=r"ends: its tokenizer .*: token \d+ is 0 \(.*\), the original's is missing"
    ):
        compare_tokenizers(ModelSource(REFERENCE), [("ends", ModelSource(str(tmp_path)))], TEXTS)


def test_a_candidate_without_a_tokenizer_is_said(tmp_path: Path) -> None:
    said = compare_tokenizers(
        ModelSource(REFERENCE), [("bare", ModelSource(str(tmp_path))), ("same", ModelSource(REFERENCE))], TEXTS
    )
    assert said == ["bare: has no tokenizer; the original's is used"]


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model whose tokenizer has three tokens more than its embedding has rows, and a text that uses them."""
    folder = tmp_path_factory.mktemp("grown")
    tiny_model(vocab_size=VOCABULARY).save_pretrained(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(REFERENCE)
    tokenizer.add_tokens([f"extra{number}" for number in range(3)])
    tokenizer.save_pretrained(folder / "model")
    (folder / "text.txt").write_text("some words extra2 more words and more " * 4000)
    return folder / "model", folder / "text.txt"


@pytest.mark.onnx
@pytest.mark.parametrize("command", LIBRARY)
def test_a_token_that_the_model_does_not_know_is_one_line_in_every_command(
    cli: Cli, grown: tuple[Path, Path], tmp_path: Path, command: str
) -> None:
    model, text = grown
    flags: tuple[object, ...] = ("-m", model, "--length", 16)
    if command in ("prune", "run", "orthogonality"):
        flags += ("--remove", 1)
    if command == "validate":
        flags = (model, model, "--length", 16)
    if command == "export":
        flags += ("--quantize", "int8-static", "--calibration", text)
    flags += tuple(text if word == "stdlib" else word for word in LIBRARY[command])
    out = ("--output", tmp_path / "out") if command in ("validate", "orthogonality") else (tmp_path / "out",)
    done = cli(command, *flags, *out)
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "token 4098 ('extra2'), but the model has embeddings for 4096" in done.err
    assert list(tmp_path.iterdir()) == []


def test_validation_refuses_a_candidate_of_equal_weights_that_reads_otherwise(cli: Cli, tmp_path: Path) -> None:
    # Without the check, the perplexity ratio would be 1.
    shutil.copytree(REFERENCE, tmp_path / "rolled")
    rolled(tmp_path / "rolled")
    words = (REFERENCE, tmp_path / "rolled", "--eval-samples", 4, "--length", 32, "--output", tmp_path / "report")
    done = cli("validate", *words, *LIBRARY["validate"])
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert (
        "rolled: its tokenizer gives other tokens for the evaluation text than the original's: token 0 is " in done.err
    )
    assert not (tmp_path / "report").exists()
