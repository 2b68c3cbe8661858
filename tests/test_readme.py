"""The README and the pages that took its place match the tables that they are made from."""

from __future__ import annotations

import json
import re
from pathlib import Path

from optimum.streamline.models.architectures import ARCHITECTURES

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_architecture_is_named() -> None:
    page = (ROOT / "docs" / "reference" / "support.md").read_text(encoding="utf-8")
    [listed] = re.findall(r"These architectures are supported: (.*?)\.\n", page, re.DOTALL)
    names = {re.sub(r"[^a-z0-9]", "", name.lower()) for name in listed.split(",")}
    assert names == {name.replace("_", "") for name in ARCHITECTURES}


def test_no_figure_is_left_to_be_filled_in() -> None:
    methods = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    measured = json.loads((ROOT / "docs" / "methods.json").read_text(encoding="utf-8"))["rows"]
    rows = (ROOT / "docs" / "methods-rows.md").read_text(encoding="utf-8")
    for row in measured:
        figures = "{:.3f} ({:.3f} to {:.3f})".format(*row["ratio"])
        assert f"| {row['model']} | {row['removed']} | {row['name']} | {row['part']} |" in rows
        assert figures in rows
    for text in (README, methods):
        assert not placeholders(text)


def placeholders(text: str) -> list[str]:
    """Marks for text that is still to be written: such as `SPEED_UP` in a sentence, or `READING` alone on a line."""
    prose = re.sub(r"`[^`]*`", "", text)
    return re.findall(r"\b[A-Z]+_[A-Z]+\b(?![`./])|^[A-Z]{4,}$", prose, re.MULTILINE)


def test_a_placeholder_is_noticed() -> None:
    assert placeholders("It takes SPEED_UP seconds.\n\nREADING\n\n`MAX_KL`, ONNX and LoRA are words.\n") == [
        "SPEED_UP",
        "READING",
    ]
