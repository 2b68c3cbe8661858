"""docs/architecture.md and its picture show the rooms as they are, and every room has a front door."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from html import escape
from importlib import import_module
from pathlib import Path

import pytest

from pages import DOCS, check_part

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "optimum.streamline": ROOT / "plugin/optimum/streamline",
    "optimum.exporters.streamline": ROOT / "exporters/optimum/exporters/streamline",
    "optimum.commands.streamline": ROOT / "plugin/optimum/commands/streamline",
}
# One file a method, whatever their number.
CROWDED = {"methods"}
OFFERS_NAMES = {*PACKAGES, "optimum.streamline.api"}
MOST_FILES = 13


def summary(file: Path) -> str:
    """The first paragraph of a file's docstring, on one line."""
    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return " ".join(text.partition("\n\n")[0].split())


def first_sentence(text: str) -> str:
    return re.split(r"(?<=[.!?]) (?=[A-Z`])", text)[0]


def rooms() -> Iterator[tuple[str, Path]]:
    """Every package and sub-package: its dotted name and its folder."""
    for package, top in PACKAGES.items():
        for door in sorted(top.rglob("__init__.py")):
            yield ".".join((package, *door.parent.relative_to(top).parts)), door.parent


def files_of(folder: Path) -> list[Path]:
    return sorted(file for file in folder.glob("*.py") if file.name != "__init__.py")


def layers() -> dict[str, list[list[str]]]:
    """The rooms of each package from the top down, those that stand beside each other together."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contracts = settings["tool"]["importlinter"]["contracts"]
    return {
        contract["containers"][0]: [layer.split(" | ") for layer in contract["layers"]]
        for contract in contracts
        if contract["type"] == "layers"
    }


def picture() -> str:
    """The rooms as boxes, the lowest at the bottom, as SVG text."""
    width, height, gap, top = 400, 34, 8, 66
    columns = list(layers().items())
    tallest = max(len(column) for _, column in columns)
    total = (len(columns) * (width + 40) + 40, top + tallest * (height + gap) + 24)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {total[0]} {total[1]}" font-family="sans-serif">',
        f'<rect width="{total[0]}" height="{total[1]}" fill="#ffffff"/>',
    ]
    for number, (package, column) in enumerate(columns):
        left = 40 + number * (width + 40)
        parts.append(f'<text x="{left}" y="34" font-size="17" font-weight="bold" fill="#1b1f24">{package}</text>')
        parts.append(f'<text x="{left}" y="54" font-size="12" fill="#57606a">a room imports only from below</text>')
        for row, layer in enumerate(column):
            y = top + (tallest - len(column) + row) * (height + gap)
            each = (width - gap * (len(layer) - 1)) / len(layer)
            for place, room in enumerate(layer):
                x = left + place * (each + gap)
                parts.append(
                    f'<rect x="{x:g}" y="{y}" width="{each:g}" height="{height}" rx="5" '
                    'fill="#ddf4ff" stroke="#54aeff"/>'
                )
                parts.append(
                    f'<text x="{x + each / 2:g}" y="{y + 22}" font-size="14" text-anchor="middle" fill="#1b1f24">'
                    f"{escape(room)}</text>"
                )
    return "\n".join([*parts, "</svg>", ""])


def file_tables() -> str:
    lines = []
    for name, folder in rooms():
        lines += [f"### `{name}`", "", summary(folder / "__init__.py"), "", "| file | what it is for |", "|---|---|"]
        lines += [f"| `{file.name}` | {summary(file).replace('|', chr(92) + '|')} |" for file in files_of(folder)]
        lines.append("")
    return "\n".join(lines).strip()


def room_table() -> str:
    lines = ["| room | what it holds |", "|---|---|"]
    for package, column in layers().items():
        known = {name.removeprefix(f"{package}."): folder for name, folder in rooms() if name.startswith(f"{package}.")}
        for room in (room for layer in column for room in layer):
            folder = known.get(room)
            file = folder / "__init__.py" if folder else PACKAGES[package] / f"{room}.py"
            lines.append(f"| `{package}.{room}` | {first_sentence(summary(file))} |")
    return "\n".join(lines)


def test_the_page_says_what_each_room_holds(request: pytest.FixtureRequest) -> None:
    check_part("architecture.md", "one line a room", room_table(), request)


def test_the_page_lists_every_file(request: pytest.FixtureRequest) -> None:
    check_part("architecture.md", "rooms", file_tables(), request)


def test_the_page_shows_the_layers_that_are_held(request: pytest.FixtureRequest) -> None:
    file = DOCS / "architecture.svg"
    if request.config.getoption("--write-pages"):
        file.write_text(picture(), encoding="utf-8")
    assert file.read_text(encoding="utf-8") == picture(), (
        "write it anew: ci/test tests/test_architecture_page.py --write-pages"
    )


@pytest.mark.parametrize(("name", "folder"), list(rooms()))
def test_every_room_has_a_front_door(name: str, folder: Path) -> None:
    door = ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))
    assert summary(folder / "__init__.py").endswith(".")
    [exported] = [
        ast.literal_eval(node.value)
        for node in door.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    ]
    if name in OFFERS_NAMES:
        room = import_module(name)
        assert exported
        assert all(getattr(room, each) is not None for each in exported)
    else:  # other rooms offer their files
        inner = {path.parent.name for path in folder.glob("*/__init__.py")}
        assert set(exported) == {file.stem for file in files_of(folder)} | inner
    assert len(files_of(folder)) <= MOST_FILES or folder.name in CROWDED


@pytest.mark.parametrize(("name", "folder"), [(name, folder) for name, folder in rooms() if name not in PACKAGES])
def test_the_tests_mirror_the_rooms(name: str, folder: Path) -> None:
    package = next(each for each in PACKAGES if name.startswith(f"{each}."))
    tests = ROOT / "tests" / package.rpartition("optimum.")[2].partition(".")[0]
    assert any((tests / folder.relative_to(PACKAGES[package])).glob("test_*.py")), name


def test_files_that_docstrings_name_are_there() -> None:
    names = {file.name for package in PACKAGES.values() for file in package.rglob("*.py")}
    for package in PACKAGES.values():
        for file in package.rglob("*.py"):
            named = re.findall(r"`(\w+\.py)`", file.read_text(encoding="utf-8"))
            missing = {each for each in named if each not in names and not any((ROOT / "tests").rglob(each))}
            assert not missing, f"{file}: names {missing}"


def test_the_page_states_the_lines_of_the_largest_file() -> None:
    files = [file for _, folder in rooms() for file in (*files_of(folder), folder / "__init__.py")]
    largest = max(len(file.read_text(encoding="utf-8").splitlines()) for file in files)
    assert f"| lines of the largest file | 469 | {largest} |" in (DOCS / "architecture.md").read_text(encoding="utf-8")
