"""Overlap of two texts is found with other line breaks, in another order, and inside a larger text."""

from __future__ import annotations

import json
import random

import pytest

from optimum.streamline.errors import StreamlineError
from optimum.streamline.text.overlap import MAX_HASHES, Sketch, check_disjoint, sketch_of
from optimum.streamline.text.sources import open_text


@pytest.fixture(scope="module")
def library() -> dict[str, list[str]]:
    return {part: list(open_text(f"stdlib:{part}").documents) for part in ("calibration", "eval", "train")}


def refuse(chosen: list[str], judged: list[str]) -> None:
    check_disjoint(sketch_of(chosen), "chosen.txt", sketch_of(judged), "judged.txt")


def test_parts_of_the_library_are_apart(library: dict[str, list[str]]) -> None:
    for chosen in ("train", "calibration"):
        refuse(library[chosen], library["eval"])


def test_the_same_text_is_refused_whatever_surrounds_it(library: dict[str, list[str]]) -> None:
    text = library["eval"]
    with pytest.raises(StreamlineError, match=r"'judged.txt' shares 100% of its text with 'chosen.txt'"):
        refuse(text, text)
    with pytest.raises(StreamlineError, match=r"shares 100% of its text"):
        refuse(library["train"] + text, ["\n\n".join(text[10:20])])
    with pytest.raises(StreamlineError, match=r"shares \d+% of its text"):
        refuse(["# another start\n", *text], [" ".join(document.split()) for document in reversed(text)])
    # A tenth of the evaluation text is in the other text.
    with pytest.raises(StreamlineError, match=r"shares (8|9|10|11|12)% of its text"):
        refuse(
            library["calibration"][:1], [library["calibration"][0], "".join(text)[: len(library["calibration"][0]) * 9]]
        )


def test_a_small_text_is_found_in_a_large_one(library: dict[str, list[str]]) -> None:
    place = random.Random(0)
    text = "".join(library["train"])
    chosen = sketch_of([text])
    for _ in range(100):
        start = place.randrange(len(text) - 4000)
        with pytest.raises(StreamlineError, match="shares"):
            check_disjoint(chosen, "chosen.txt", sketch_of([text[start : start + 4000]]), "judged.txt")


def test_short_rows_are_known_again_in_any_order() -> None:
    chance = random.Random(0)
    words = [f"word{number}" for number in range(5000)]
    rows, others = ([" ".join(chance.choices(words, k=10)) for _ in range(4000)] for _ in range(2))
    shuffled = chance.sample(rows, len(rows))
    for judged in (shuffled, ["\n".join(shuffled)], shuffled[:40]):
        with pytest.raises(StreamlineError, match=r"'judged.txt' shares 100% of its lines with 'chosen.txt'"):
            refuse(rows, judged)
    with pytest.raises(StreamlineError, match=r"shares (4[5-9]|5[0-5])% of its lines"):
        refuse(rows, chance.sample(rows[:2000] + others[:2000], 4000))
    refuse(rows, others)


def test_headings_that_recur_are_no_shared_text(library: dict[str, list[str]]) -> None:
    # As in data sets with one line per row: both parts have the same headings, but other text between them.
    def with_headings(part: str) -> list[str]:
        lines = "\n".join(library[part])[:100_000].splitlines()
        return [f"= = Reception = =\n{line}" if number % 5 == 0 else line for number, line in enumerate(lines)]

    refuse(with_headings("train"), with_headings("eval"))


def test_a_sketch_is_small_and_survives_a_record(library: dict[str, list[str]]) -> None:
    sketch = sketch_of(library["train"])
    for sample in (sketch.runs, sketch.lines):
        assert MAX_HASHES / 4 < len(sample.hashes) <= MAX_HASHES
        assert len(json.dumps(sample.to_dict())) < 4 * MAX_HASHES
    assert Sketch.from_dict(json.loads(json.dumps(sketch.to_dict()))) == sketch
    assert Sketch.from_dict(json.loads(json.dumps(Sketch().to_dict()))) == Sketch()


def test_a_text_of_one_line_over_and_over_has_a_sketch() -> None:
    line = "the same line over and over again, of some length but not of much variety; "
    assert len(sketch_of([line * 50_000]).runs.hashes) > 10
    with pytest.raises(StreamlineError, match="shares 100%"):
        refuse([line * 50_000], [line * 100])
