"""Token windows: their length, their order, and the refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from optimum.streamline.errors import StreamlineError
from optimum.streamline.text import read_documents
from optimum.streamline.windows import check_disjoint, read_windows
from reference import REFERENCE


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(REFERENCE)


def test_windows_are_the_text_end_to_end(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("def one():\n    return 1\n" * 30)
    (tmp_path / "b.txt").write_text("class Two:\n    pass\n" * 30)
    windows = read_windows(str(tmp_path), tokenizer, 5, 16, seed=0)
    assert windows.ids.shape == (5, 16)
    text = tokenizer.decode(windows.ids.flatten())
    assert text.startswith(("def one():\n    return 1\n", "class Two:\n    pass\n"))


def test_documents_are_closed_by_the_end_token(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.txt").write_text("one")
    ids = tokenizer("one")["input_ids"] + [tokenizer.eos_token_id]
    windows = read_windows(str(tmp_path), tokenizer, 1, 2 * len(ids), seed=0)
    assert windows.ids.tolist() == [ids + ids]


def test_the_same_seed_gives_the_same_windows(tokenizer: PreTrainedTokenizerBase) -> None:
    first = read_windows("stdlib", tokenizer, 8, 64, seed=1, part="calibration")
    again = read_windows("stdlib:calibration", tokenizer, 8, 64, seed=1)
    other = read_windows("stdlib", tokenizer, 8, 64, seed=2, part="calibration")
    assert torch.equal(first.ids, again.ids)
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert first.spec == "stdlib:calibration"


def test_text_too_short_says_how_much_there_is(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("word " * 100)
    count = len(tokenizer("word " * 100)["input_ids"]) + 1
    with pytest.raises(
        StreamlineError, match=rf"{count} tokens, too short for 50 windows of 64; ask for at most {count // 64}"
    ):
        read_windows(str(tmp_path / "a.txt"), tokenizer, 50, 64, seed=0)


def test_judging_on_the_text_of_the_choice_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    chosen = read_windows("stdlib:calibration", tokenizer, 32, 64, seed=0)
    check_disjoint(chosen.runs(), chosen.spec, read_windows("stdlib:eval", tokenizer, 32, 64, seed=0))
    with pytest.raises(StreamlineError, match="shares 100% of its text with 'stdlib:calibration'"):
        check_disjoint(chosen.runs(), chosen.spec, read_windows("stdlib:calibration", tokenizer, 32, 64, seed=0))


def library_text(part: str, characters: int) -> str:
    return "\n".join(read_documents(f"stdlib:{part}"))[:characters]


def test_the_same_text_in_another_file_is_the_same_text(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text(library_text("eval", 100_000))
    (tmp_path / "two.txt").write_text("# another start\n" + library_text("eval", 100_000) + "\n")
    one = read_windows(str(tmp_path / "one.txt"), tokenizer, 40, 64, seed=0)
    two = read_windows(str(tmp_path / "two.txt"), tokenizer, 60, 40, seed=0)
    with pytest.raises(StreamlineError, match=r"one\.txt"):
        check_disjoint(one.runs(), one.spec, two)


def test_headings_that_recur_are_no_shared_text(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    # As in data sets of a line a row: the same headings in every part, other text between them.
    windows = []
    for part in ("train", "eval"):
        lines = library_text(part, 100_000).splitlines()
        text = "\n".join(f"= = Reception = =\n{line}" if number % 5 == 0 else line for number, line in enumerate(lines))
        (tmp_path / f"{part}.txt").write_text(text)
        windows.append(read_windows(str(tmp_path / f"{part}.txt"), tokenizer, 100, 64, seed=0))
    check_disjoint(windows[0].runs(), "train", windows[1])
