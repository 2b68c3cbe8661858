"""The README keeps up with the tree: every source file is on its map, and every architecture of the table is named."""

from __future__ import annotations

import json
import re
from pathlib import Path

from optimum.streamline.anatomy import ARCHITECTURES

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_map_names_every_file_once() -> None:
    tree = README.partition("## Map")[2]
    for folder in ("plugin/optimum/commands", "plugin/optimum/streamline", "exporters/optimum/exporters/streamline"):
        section = tree.partition(f"**{folder}/**")[2].partition("\n| **")[0]
        named = re.findall(r"`([\w./]+\.(?:py|j2))`", re.sub(r"`methods/`.*", "", section))
        files = {
            str(file.relative_to(ROOT / folder))
            for file in (ROOT / folder).rglob("*.*")
            if file.suffix in (".py", ".j2")
        }
        expected = {file for file in files if not file.startswith("methods/")}
        if folder == "plugin/optimum/streamline":
            expected.remove("__init__.py")
        assert sorted(named) == sorted(expected)


def test_every_architecture_is_named() -> None:
    [listed] = re.findall(r"Architectures other than these: (.*?)\.\n", README, re.DOTALL)
    names = {re.sub(r"[^a-z0-9]", "", name.lower()) for name in listed.split(",")}
    assert names == {name.replace("_", "") for name in ARCHITECTURES}


def test_no_figure_is_left_to_be_filled_in() -> None:
    methods = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    measured = json.loads((ROOT / "docs" / "methods.json").read_text(encoding="utf-8"))["rows"]
    rows = (ROOT / "docs" / "methods-rows.md").read_text(encoding="utf-8")
    for row in measured:
        figures = "{:.3f} ({:.3f} to {:.3f})".format(*row["ratio"])
        assert f"| {row['model']} | {row['removed']} | {row['name']} | {row['seed']} |" in rows
        assert figures in rows
    for text in (README, methods):
        assert not re.search(r"\b[A-Z]+_[A-Z]+\b(?![`./])", re.sub(r"`[^`]*`", "", text))
        assert "READING" not in text
