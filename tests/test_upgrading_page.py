"""docs/upgrading.md leads every public name of 0.1.0 to a name that exists.

`names_of_0_1_0.txt` holds the public names of 0.1.0, and of the last commit before the rooms, one module a line:
functions, classes with their public members, and constants.
"""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import pytest

from optimum.streamline.recipe.recipe import OPTIONS, Recipe

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "upgrading.md").read_text(encoding="utf-8")
PACKAGES = ("optimum.exporters.streamline", "optimum.streamline")
pytestmark = pytest.mark.onnx


def part(name: str) -> list[list[str]]:
    """The rows of a table on the page, as cells, without its head."""
    [table] = re.findall(rf"<!-- {re.escape(name)} -->\n(.*?)<!-- end of {re.escape(name)} -->", PAGE, re.DOTALL)
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("|")]
    return rows[2:]


def code(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def full(name: str, package: str) -> str:
    return name if name.startswith("optimum.") else f"{package}.{name}"


def inventory() -> dict[str, list[str]]:
    lines = (ROOT / "tests" / "names_of_0_1_0.txt").read_text(encoding="utf-8").splitlines()
    return {module: names.split() for module, _, names in (line.partition(": ") for line in lines)}


def moves() -> dict[str, dict[str, str]]:
    """For each old module: the new module of each name, and under an empty name that of all others."""
    found = {}
    for package in PACKAGES:
        for old, new in part(f"modules of {package}"):
            first, *others = new.split("; ")
            places = {"": full(code(first)[0], package)}
            for module, *names in map(code, others):
                places |= dict.fromkeys(names, full(module, package))
            found[full(code(old)[0], package)] = places
    return found


def renames() -> dict[str, dict[str, str]]:
    """For each old module: the new names."""
    return {
        full(code(module)[0], package): dict(re.findall(r"`([^`]+)` → `([^`]+)`", names))
        for package in PACKAGES
        for module, names in part(f"names of {package}")
    }


def removed() -> set[str]:
    names = {full(each, "optimum.streamline") for old, _ in part("removed") for each in code(old) if "." in each}
    methods = [module for module in inventory() if module.startswith("optimum.streamline.methods.")]
    return names | {f"{m}.{name}" for m in methods for name in inventory()[m] if name.endswith(".summary")}


def has(path: str) -> bool:
    """Whether a dotted path is a name of a module, or a member of a class in it; a field without a default, too."""
    parts = path.split(".")
    for end in range(len(parts), 0, -1):
        try:
            value: Any = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for each in parts[end:]:
            if not hasattr(value, each):
                return inspect.isclass(value) and any(each in getattr(k, "__annotations__", {}) for k in value.__mro__)
            value = getattr(value, each)
        return True
    return False


@pytest.mark.parametrize("module", inventory())
def test_every_public_name_leads_to_one_that_exists(module: str) -> None:
    places, new_names, gone = moves().get(module, {"": module}), renames().get(module, {}), removed()
    assert set(new_names) <= set(inventory()[module]), "renamed on the page, and was never there"
    for name in inventory()[module]:
        if f"{module}.{name}" in gone:
            continue
        top, _, member = name.partition(".")
        new_top = new_names.get(top, top)
        new = new_names.get(name, f"{new_top}.{member}" if member else new_top)
        if module == "optimum.streamline.recipe" and top == "Recipe" and not hasattr(Recipe, member):
            continue  # options and their groups: the next test
        path = f"{places.get(new_top, places[''])}.{new}"
        assert has(path), f"{module}.{name}: the page leads to {path}"


def test_every_option_of_a_recipe_is_listed() -> None:
    old = {name.partition(".")[2] for name in inventory()["optimum.streamline.recipe"] if name.startswith("Recipe.")}
    grouped = {key: f"{each.group}.{each.name}" for key, each in OPTIONS.items() if each.group not in ("", "budget")}
    listed = dict(pair for _, cell in part("recipe") for pair in re.findall(r"`(\w+)` → `([\w.]+)`", cell))
    assert listed == {key: place for key, place in grouped.items() if key in old}
    properties = dict(re.findall(r"`(\w+)` →\s+`(resolved_\w+)`", PAGE))
    assert all(hasattr(Recipe, new) for new in properties.values())
    assert old <= {*listed, *properties, *dir(Recipe())}


def test_old_module_names_are_of_0_1_0() -> None:
    assert set(moves()) | set(renames()) <= set(inventory())


def test_what_moved_to_a_second_module_is_there() -> None:
    for places in moves().values():
        for name, module in places.items():
            assert has(f"{module}.{name}" if name else module), f"{module}.{name}"


def test_what_to_write_instead_exists() -> None:
    for _, instead in part("removed"):
        for name in code(instead):
            if "." in name:
                assert has(full(name, "optimum.streamline")), name


def test_arguments_are_named_as_the_page_says() -> None:
    for old, new, functions in part("arguments"):
        for path in code(functions):
            module, _, name = full(path, "optimum.streamline").rpartition(".")
            arguments = inspect.signature(getattr(importlib.import_module(module), name)).parameters
            assert code(new)[0] in arguments, path
            assert code(old)[0] not in arguments, path
