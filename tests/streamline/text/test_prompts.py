"""What the original samples text from: first tokens of the calibration text, or a file of prompts."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from optimum.streamline.errors import StreamlineError
from optimum.streamline.healing.checks import check_healing
from optimum.streamline.model_files.source import ModelSource
from optimum.streamline.pipeline.texts import inputs_of
from optimum.streamline.recipe.parsing import make_recipe
from optimum.streamline.text.prompts import PROMPT_TOKENS, Prompts, calibration_prompts, file_prompts
from optimum.streamline.text.sampling import WindowEncoder
from optimum.streamline.text.sources import open_text
from reference import REFERENCE, VOCABULARY

TEMPLATE = (
    "{% for message in messages %}# {{ message.role }}\n{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}# answer\n{% endif %}"
)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(REFERENCE)
    return found


def read(spec: object, tokenizer: PreTrainedTokenizerBase, length: int = 64, seed: int = 0) -> Prompts:
    return file_prompts(f"self:{spec}", tokenizer, 10, length, seed=seed, vocabulary=VOCABULARY)


def drawn(text: object, tokenizer: PreTrainedTokenizerBase, count: int, length: int = 64) -> Prompts:
    sizes: dict[str, Any] = {"samples": 2, "seed": 0, "vocabulary": VOCABULARY}
    return calibration_prompts(str(text), tokenizer, count, length, **sizes)


WRITERS: dict[str, Callable[[Path, list[str]], object]] = {
    "prompts.txt": lambda file, texts: file.write_text("\n".join(texts) + "\n\n"),
    "prompts.jsonl": lambda file, texts: file.write_text("\n".join(json.dumps({"text": each}) for each in texts)),
    "prompts.csv": lambda file, texts: file.write_text("text\n" + "\n".join(f'"{each}"' for each in texts)),
}


@pytest.mark.parametrize("name", WRITERS)
def test_each_line_or_row_is_a_prompt_and_the_seed_orders_them(
    name: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    texts = [f"def function_{number}(self):" for number in range(9)]
    WRITERS[name](tmp_path / name, texts)
    prompts = read(tmp_path / name, tokenizer)
    assert sorted(tokenizer.batch_decode(prompts.ids)) == texts
    assert list(tokenizer.batch_decode(prompts.ids)) != texts
    assert read(tmp_path / name, tokenizer).ids == prompts.ids
    assert read(tmp_path / name, tokenizer, seed=1).ids != prompts.ids
    assert "continued as they are: the tokenizer has no chat template" in prompts.line("healing")


def test_a_column_is_named_and_rows_that_end_in_newlines_are_not_joined(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(json.dumps({"id": "x", "prompt": f"import {name}\n"}) for name in ("os", "re")))
    assert sorted(tokenizer.batch_decode(read(f"{file},prompt", tokenizer).ids)) == ["import os", "import re"]
    with pytest.raises(StreamlineError, match=r"name the column, one of id, prompt"):
        read(file, tokenizer)


def test_a_chat_template_makes_a_question_of_a_prompt(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("why so\n")
    tokenizer.chat_template = TEMPLATE
    prompts = read(tmp_path / "prompts.txt", tokenizer)
    [ids] = prompts.ids
    assert tokenizer.decode(ids) == "# user\nwhy so\n# answer\n"
    assert prompts.describe()["chat_template"]
    assert "no chat template" not in prompts.line("healing")
    tokenizer.chat_template = "{{ raise_exception('a system message comes first') }}"
    with pytest.raises(StreamlineError, match=r"chat template cannot take its prompts .*a system message comes first"):
        read(tmp_path / "prompts.txt", tokenizer)


def test_prompts_that_leave_no_room_are_left_out_and_counted(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("import os\n" + "import sys, " * 40 + "\n")
    prompts = read(file, tokenizer)
    assert tokenizer.batch_decode(prompts.ids) == ["import os"]
    assert prompts.line("healing").endswith("; 1 prompts that fill over half a window left out")
    file.write_text("import sys, " * 40)
    with pytest.raises(StreamlineError) as refused:
        read(file, tokenizer)
    found = re.search(r"its shortest prompt takes (\d+) tokens, .* or length (\d+)$", str(refused.value))
    assert found is not None
    assert read(file, tokenizer, length=int(found[2])).too_long == 0


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("", "heal-data 'self:': names no file of prompts; give self:FILE"),
        ("{0}/none.txt", "{0}/none.txt is no file; give self:FILE, with one prompt in a line"),
        ("{0}", "{0} is a folder; give self:FILE"),
        ("{0}/blank.txt", "holds no prompt"),
        ("{0}/blank.txt,prompt", "column 'prompt': it is not a table"),
        ("{0}/picture.txt", "is not text"),
    ],
)
def test_prompts_that_cannot_be_read_are_refused_in_a_line(
    spec: str, says: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    (tmp_path / "blank.txt").write_text("\n \n")
    (tmp_path / "picture.txt").write_bytes(b"\x89PNG\0\0")
    with pytest.raises(StreamlineError) as refused:
        read(spec.format(tmp_path), tokenizer)
    assert says.format(tmp_path) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_calibration_text_gives_its_first_tokens(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    text = (Path(REFERENCE).parent / "train_reference_model.py").read_text()
    (tmp_path / "text.txt").write_text(text)
    prompts = drawn(tmp_path / "text.txt", tokenizer, 20)
    prefix = WindowEncoder(tokenizer).prefix
    assert {len(ids) for ids in prompts.ids} == {len(prefix) + PROMPT_TOKENS}
    assert len(set(prompts.ids)) == 20
    assert all(tokenizer.decode(ids[len(prefix) :]) in text for ids in prompts.ids)
    assert prompts.line("healing").startswith("healing text: self, 20 windows of 64 tokens that the original samples")


def test_a_short_calibration_text_gives_as_many_prompts_as_it_has(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    file = tmp_path / "text.txt"
    text = " ".join(f"word{number}" for number in range(60))
    file.write_text(text)
    assert len(tokenizer(text)["input_ids"]) >= 128  # two windows of 64
    prompts = drawn(file, tokenizer, 10_000)
    assert (len(prompts.ids), prompts.count) == (2 * (64 // PROMPT_TOKENS), 10_000)
    with pytest.raises(StreamlineError, match=r"length 16: heal-data 'self' begins each window with .*at least 3"):
        drawn(file, tokenizer, 2, length=16)


@pytest.mark.parametrize("spec", ["self", "self:prompts.txt"])
def test_only_healing_text_is_sampled(spec: str) -> None:
    with pytest.raises(StreamlineError, match=rf"text SPEC '{spec}': .* is for heal-data alone; .* or \./{spec} for a"):
        open_text(spec)


@pytest.mark.parametrize("spec", ["self+stdlib", "self,stdlib"])
def test_it_cannot_be_mixed(spec: str) -> None:
    recipe = make_recipe({"layers": "3", "heal": "lm", "heal_data": spec})
    with pytest.raises(StreamlineError, match=r"cannot be mixed with other text; give self, self:PROMPTS, or another"):
        check_healing(recipe)


def test_the_file_of_prompts_is_an_input_that_no_output_replaces() -> None:
    recipe = make_recipe({"layers": "3", "heal": "lm", "heal_data": "self:a/prompts.csv,question"})
    assert "a/prompts.csv" in inputs_of(ModelSource(REFERENCE), recipe)
    assert "self" not in inputs_of(ModelSource(REFERENCE), recipe.with_options(heal_data="self"))
