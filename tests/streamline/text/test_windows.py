"""Drawing windows from a text: their positions, their first tokens, their description, and errors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from optimum.streamline.errors import StreamlineError
from optimum.streamline.text.sources import open_text
from optimum.streamline.text.windows import Windows, read_windows
from reference import REFERENCE, VOCABULARY
from small_tokenizers import llama
from tokenizers_made import begins_with, with_beginning


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(REFERENCE)


def read(
    spec: object,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    length: int,
    seed: int = 0,
    vocabulary: int = VOCABULARY,
) -> Windows:
    return read_windows(str(spec), tokenizer, count, length, seed, vocabulary)


def numbered(file: Path, lines: int) -> Path:
    """A text in which every line has its number in its first word."""
    file.write_text("\n".join(f"line{number} of many, with some words" for number in range(lines)))
    return file


def places(windows: Windows, tokenizer: PreTrainedTokenizerBase) -> list[set[int]]:
    """The numbers of the complete lines in each window."""
    texts = [tokenizer.decode(ids) for ids in windows.ids]
    return [{int(word[4:]) for word in text.split()[1:-1] if word.startswith("line")} for text in texts]


def test_windows_come_from_all_over_a_text_and_never_share_any(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    windows = read(numbered(tmp_path / "a.txt", 4000), tokenizer, 40, 64)
    assert windows.ids.shape == (40, 64)
    found = places(windows, tokenizer)
    firsts = sorted(min(each) for each in found)
    # 40 random windows hit every quarter of the text.
    assert all(any(start <= first < start + 1000 for first in firsts) for start in range(0, 4000, 1000))
    assert sum(map(len, found)) == len(set().union(*found))
    assert firsts != [min(each) for each in found]  # in random order, so that any part of them is a random sample


def test_a_window_is_the_text_as_it_stands(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    file = numbered(tmp_path / "a.txt", 4000)
    whole = tokenizer(file.read_text())["input_ids"]
    joined = " ".join(map(str, whole))
    for ids in read(file, tokenizer, 20, 32).ids.tolist():
        assert " ".join(map(str, ids)) in joined


def test_a_window_begins_with_one_space_where_the_tokenizer_puts_one(tmp_path: Path) -> None:
    made, _ = llama()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")
    assert "".join(tokenizer.convert_ids_to_tokens(tokenizer(" word")["input_ids"])).startswith("<s>▁▁word")
    file = numbered(tmp_path / "a.txt", 2000)
    joined = " ".join(map(str, tokenizer(file.read_text())["input_ids"]))
    for count in (8, 400):  # few windows of many possible ones, and all of few
        for ids in read(file, tokenizer, count, 48, vocabulary=len(tokenizer)).ids.tolist():
            assert not "".join(tokenizer.convert_ids_to_tokens(ids[1:])).startswith("▁▁")
            assert " ".join(map(str, ids[3:])) in joined


def test_all_tokens_of_a_small_text_can_be_had(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.txt").write_text("one")
    ids = tokenizer("one")["input_ids"] + [tokenizer.eos_token_id]
    windows = read(tmp_path, tokenizer, 1, 2 * len(ids))
    assert windows.ids.tolist() == [ids + ids]
    assert (windows.possible, windows.documents) == (1, (0,))


def test_every_window_begins_as_the_tokenizer_begins_a_text(tmp_path: Path) -> None:
    beginning = with_beginning("<s>")
    for lines, count in ((4000, 20), (40, 8)):  # few windows of many possible ones, and all of few
        windows = read(numbered(tmp_path / "a.txt", lines), beginning, count, 24)
        assert windows.prefix == (beginning.bos_token_id,)
        assert (windows.ids == beginning.bos_token_id).sum(1).tolist() == [1] * count
        assert (windows.ids[:, 0] == beginning.bos_token_id).all()
        assert windows.describe()["prefix"] == [beginning.bos_token_id]


def test_documents_in_one_window_have_between_them_what_the_tokenizer_ends_and_begins_a_text_with(
    tmp_path: Path,
) -> None:
    beginning = with_beginning("<s>")
    (tmp_path / "rows.csv").write_text("text\n" + "".join(f"row number {number}\n" for number in range(3000)))
    for count in (4, 700):
        windows = read(tmp_path / "rows.csv", beginning, count, 24)
        for ids in windows.ids.tolist():
            text = beginning.decode(ids)
            first, *others = text.split("</s>")
            assert first.startswith("<s>")
            # A row that the end of the window cuts, or a complete row.
            assert all("<s>row number ".startswith(row) or row.startswith("<s>row number ") for row in others)
            assert others
            assert "<s><s>" not in text


def test_a_tokenizer_that_adds_nothing_has_no_prefix(tokenizer: PreTrainedTokenizerBase) -> None:
    windows = read("stdlib:eval", tokenizer, 2, 16)
    assert windows.prefix == ()
    assert windows.describe()["prefix"] == []
    assert begins_with(tokenizer) == []


def test_documents_of_a_tokenizer_without_beginning_and_end_are_an_empty_line_apart(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(REFERENCE)
    tokenizer.eos_token = None
    (tmp_path / "rows.csv").write_text("text\n" + "".join(f"row number {number}\n" for number in range(3000)))
    for count in (4, 700):
        windows = read(tmp_path / "rows.csv", tokenizer, count, 24)
        assert windows.describe()["separator"] == tokenizer("\n\n")["input_ids"] == list(windows.separator)
        for ids in windows.ids.tolist():
            _, *others = tokenizer.decode(ids).split("\n\n")
            assert others
            assert all("row number ".startswith(row) or row.count("row") == 1 for row in others)


def test_the_same_seed_gives_the_same_windows(tokenizer: PreTrainedTokenizerBase) -> None:
    first = read_windows("stdlib", tokenizer, 8, 64, 1, VOCABULARY, "calibration")
    again = read("stdlib:calibration", tokenizer, 8, 64, seed=1)
    other = read("stdlib:calibration", tokenizer, 8, 64, seed=2)
    assert torch.equal(first.ids, again.ids)
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert first.spec == "stdlib:calibration"


def test_what_was_drawn_from_what_is_said(tokenizer: PreTrainedTokenizerBase) -> None:
    windows = read("stdlib:eval", tokenizer, 8, 64)
    said = windows.describe()
    characters = sum(map(len, open_text("stdlib:eval").documents))
    assert characters / 64 / 5 < said["possible"] < characters / 64 / 2  # a token has two to five characters
    assert 1 < said["documents"] == len(set(windows.documents)) <= 8
    assert "commit" not in said
    line = windows.line("evaluation")
    assert line == f"evaluation text: stdlib:eval, 8 windows of 64 tokens drawn from {windows.possible:,} possible ones"
    assert (said["read_characters"], said["whole"]) == (characters, True)


def test_a_window_knows_the_document_that_it_begins_in(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    for name in "abcd":
        (tmp_path / f"{name}.txt").write_text(f"word{name} " * 2000)
    for count in (8, 100):
        windows = read(tmp_path, tokenizer, count, 24)
        texts = [tokenizer.decode(ids) for ids in windows.ids]
        assert all(f"word{'abcd'[number]}" in text for number, text in zip(windows.documents, texts, strict=True))
        assert len(set(windows.documents)) > 1
        assert windows.part(3, 5).documents == windows.documents[3:5]


def test_text_too_short_says_how_much_there_is(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("word " * 100)
    count = len(tokenizer("word " * 100)["input_ids"]) + 1
    with pytest.raises(
        StreamlineError, match=rf"{count} tokens, too short for 50 windows of 64; ask for at most {count // 64}"
    ):
        read(tmp_path / "a.txt", tokenizer, 50, 64)
    assert len(read(tmp_path / "a.txt", tokenizer, count // 64, 64).ids) == count // 64
    (tmp_path / "a.txt").write_text(" \n")
    with pytest.raises(StreamlineError, match="0 tokens, too short for 1 windows"):
        read(tmp_path / "a.txt", tokenizer, 1, 8)


def test_an_endless_text_is_read_until_there_is_enough(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [f'{{"text": "row number {number}"}}' for number in range(20_000)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    monkeypatch.setattr("optimum.streamline.text.windows.MIN_CHARACTERS", 10_000)
    some = read(f"hub:{tmp_path}", tokenizer, 10, 24)
    more = read(f"hub:{tmp_path}", tokenizer, 100, 24)
    whole = read(tmp_path / "rows.jsonl", tokenizer, 10, 24)
    assert 80 <= some.possible < 200 < 800 <= more.possible < 1000 < whole.possible
    said = some.describe()
    assert (said["read_characters"], said["whole"]) == (some.characters, False)
    assert 10_000 <= some.characters < 10_020 < more.characters
    assert (
        f"drawn from {some.possible} possible ones in the first {some.characters:,} characters that were"
        in some.line("evaluation")
    )
    # A Hub data set that was read to its end counts as read completely.
    (tmp_path / "rows.jsonl").write_text("\n".join(rows[:500]))
    assert read(f"hub:{tmp_path}", tokenizer, 10, 24).whole


def test_tokens_beyond_the_embedding_are_refused(tmp_path: Path) -> None:
    # Three tokens more than the embedding has rows, used in the text.
    tokenizer = AutoTokenizer.from_pretrained(REFERENCE)
    tokenizer.add_tokens([AddedToken(f"extra{number}") for number in range(3)])
    (tmp_path / "a.txt").write_text("some words extra2 more words " * 100)
    read(tmp_path / "a.txt", tokenizer, 4, 16, vocabulary=VOCABULARY + 3)
    with pytest.raises(StreamlineError, match=r"token 4098 \('extra2'\), but the model has embeddings for 4096"):
        read(tmp_path / "a.txt", tokenizer, 4, 16)
