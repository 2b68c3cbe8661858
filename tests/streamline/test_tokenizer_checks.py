"""Tokenizers are questioned: one that reads nothing, one that knows nothing, and one that reads otherwise."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from optimum.streamline.checkpoint import load_tokenizer
from optimum.streamline.errors import StreamlineError
from optimum.streamline.source import Source
from optimum.streamline.tokenizer_checks import compare_tokenizers
from optimum.streamline.windows import read_windows
from reference import REFERENCE, VOCABULARY
from tokenizers_made import rolled

TEXTS = ("def one():\n    return 1\n", "import os\n\nclass Two:\n    pass\n")


def read(tokenizer: PreTrainedTokenizerBase, spec: str = "stdlib:eval") -> None:
    read_windows(spec, tokenizer, 4, 16, 0, VOCABULARY)


def test_a_class_without_its_files_reads_nothing_and_is_refused(tmp_path: Path) -> None:
    # Row 9: transformers makes a tokenizer of three tokens of this.
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    tokenizer = load_tokenizer(Source(str(tmp_path)))
    message = r"LlamaTokenizer of 3 tokens: makes \d+ tokens of \d+ characters of 'stdlib:eval'; it cannot read this"
    with pytest.raises(StreamlineError, match=message):
        read(tokenizer)
    rows = "".join(f"a row of a few words, the {number}th\n" for number in range(2000))
    (tmp_path / "rows.csv").write_text("text\n" + rows.replace(",", ""))
    with pytest.raises(StreamlineError, match="it cannot read this text, or its files are not there"):
        read(tokenizer, str(tmp_path / "rows.csv"))


def test_text_that_is_mostly_unknown_is_refused(tmp_path: Path) -> None:
    words = Tokenizer(models.WordLevel({"<unk>": 0, "import": 1, "return": 2, "os": 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
    with pytest.raises(StreamlineError, match=r"of 4 tokens: \d+% of 'stdlib:eval' are unknown to it \('<unk>'\)"):
        read(tokenizer)
    (tmp_path / "known.txt").write_text("import os return os, " * 100)  # one in five
    read(tokenizer, str(tmp_path / "known.txt"))


def test_a_candidate_that_reads_otherwise_is_refused_with_the_first_difference(tmp_path: Path) -> None:
    # Row 10: equal weights, and a vocabulary rolled by one.
    rolled(tmp_path)
    original = AutoTokenizer.from_pretrained(REFERENCE)
    first = original(TEXTS[0])["input_ids"][0]
    difference = rf"token 0 is \d+ \('def'\), the original's is {first} \('def'\)"
    message = rf"rolled: its tokenizer reads .* otherwise than the original's: {difference}"
    with pytest.raises(StreamlineError, match=message):
        compare_tokenizers(Source(REFERENCE), [("same", Source(REFERENCE)), ("rolled", Source(str(tmp_path)))], TEXTS)


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
        StreamlineError, match=r"ends: its tokenizer .*: token \d+ is 0 \(.*\), the original's is not there"
    ):
        compare_tokenizers(Source(REFERENCE), [("ends", Source(str(tmp_path)))], TEXTS)


def test_a_candidate_without_a_tokenizer_is_said(tmp_path: Path) -> None:
    said = compare_tokenizers(Source(REFERENCE), [("bare", Source(str(tmp_path))), ("same", Source(REFERENCE))], TEXTS)
    assert said == ["bare: holds no tokenizer; it is taken to use the original's"]
