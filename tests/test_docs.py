"""The pages keep up with the program: commands, recipes, imports and links in them are real."""

from __future__ import annotations

import ast
import importlib
import itertools
import re
import shlex
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from optimum.commands.optimum_cli import main

from optimum.commands.streamline import StreamlineCommand
from optimum.streamline import StreamlineConfig, StreamlineError
from optimum.streamline.recipe.recipe import GROUPS, OPTIONS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
TEXTS = {str(page.relative_to(ROOT)): page.read_text(encoding="utf-8") for page in PAGES}
COMMANDS = {command.name for command in StreamlineCommand.SUBCOMMANDS}
OURS = "https://(?:github.com|raw.githubusercontent.com)/huggingface/optimum-streamline/"


def blocks(text: str, language: str) -> Iterator[str]:
    """The fenced blocks of a language, those in lists too."""
    for indent, block in re.findall(rf"^( *)```{language}\n(.*?)^ *```$", text, re.DOTALL | re.MULTILINE):
        yield re.sub(rf"^{indent}", "", block, flags=re.MULTILINE)


def shell_lines(text: str) -> Iterator[str]:
    """Lines of shell: of bash blocks, and, as the README has them, of indented ones."""
    for block in blocks(text, "bash"):
        yield from block.replace("\\\n", " ").splitlines()
    yield from re.findall(r"^    (optimum-cli .*)$", text, re.MULTILINE)


def commands(text: str) -> Iterator[list[str]]:
    """What follows `optimum-cli` in each line of shell that calls it."""
    for line in shell_lines(text):
        words = shlex.split(line, comments=True)
        if "streamline" in words and any("optimum-cli" in word or "optimum_cli" in word for word in words):
            start = words.index("streamline")
            yield list(itertools.takewhile(lambda word: word not in ("&&", "||", "|", ";", ">"), words[start:]))


@pytest.fixture
def parse(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], Namespace]:
    """Reads words as `optimum-cli` does, up to where the command would run."""
    seen: list[Namespace] = []
    for command in StreamlineCommand.SUBCOMMANDS:
        monkeypatch.setattr(command.subcommand_class, "run", lambda self: seen.append(self.args))

    def read(words: list[str]) -> Namespace:
        monkeypatch.setattr(sys, "argv", ["optimum-cli", *words])
        main()
        return seen[-1]

    return read


@pytest.mark.parametrize("page", [page for page, text in TEXTS.items() if any(commands(text))])
def test_commands_are_accepted(page: str, parse: Callable[[list[str]], Namespace]) -> None:
    for words in commands(TEXTS[page]):
        args = vars(parse(words))
        if words[1] not in ("export", "quantize"):  # their `--quantize` takes names that a recipe does not
            StreamlineConfig(**{key: args[key] for key in OPTIONS if key in args})


def test_a_wrong_value_in_a_command_is_noticed(parse: Callable[[list[str]], Namespace]) -> None:
    args = vars(parse(["streamline", "prune", "-m", "model", "out", "--heal", "no-such-training"]))
    with pytest.raises(StreamlineError, match="heal"):
        StreamlineConfig(**{key: args[key] for key in OPTIONS if key in args})


def test_a_wrong_flag_is_noticed(parse: Callable[[list[str]], Namespace]) -> None:
    with pytest.raises(SystemExit):
        parse(["streamline", "prune", "-m", "model", "out", "--no-such-flag"])


def test_commands_and_flags_in_sentences_exist(capsys: pytest.CaptureFixture[str]) -> None:
    helps = {}
    for name in COMMANDS:
        with pytest.raises(SystemExit):
            sys_argv, sys.argv = sys.argv, ["optimum-cli", "streamline", name, "--help"]
            try:
                main()
            finally:
                sys.argv = sys_argv
        helps[name] = set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", capsys.readouterr().out))
    every = set().union(*helps.values())
    others = {"--write-pages", "--nproc_per_node", "--mpirun_hostfile", "--help", "--quiet"}
    for page, text in TEXTS.items():
        for code in re.findall(r"`([^`\n]+)`", re.sub(r"^ *```.*?^ *```$", "", text, flags=re.DOTALL | re.MULTILINE)):
            command = re.match(r"optimum-cli streamline (\S+)", code)
            assert not command or command[1] in COMMANDS, f"{page}: {code}"
            if code.startswith("--") or command:
                known = helps[command[1]] if command else every | others
                flags = set(re.findall(r"(?<!\S)--[a-z][\w-]*", code))
                assert flags <= known, f"{page}: {code}"


@pytest.mark.parametrize("page", [page for page, text in TEXTS.items() if any(blocks(text, "yaml"))])
def test_recipes_are_accepted(page: str) -> None:
    for block in blocks(TEXTS[page], "yaml"):
        fields = yaml.safe_load(block)
        if "jobs" not in fields:  # of a pipeline
            StreamlineConfig(**fields)


def test_the_recipe_is_the_demos() -> None:
    assert (ROOT / "examples" / "quarter_off.yaml").read_text() in TEXTS["docs/reference/recipe.md"]


@pytest.mark.onnx
@pytest.mark.parametrize("page", [page for page, text in TEXTS.items() if any(blocks(text, "python"))])
def test_python_compiles_and_imports_what_exists(page: str) -> None:
    for block in blocks(TEXTS[page], "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Import):
                for each in node.names:
                    importlib.import_module(each.name)
            if isinstance(node, ast.ImportFrom) and node.module:
                module: Any = importlib.import_module(node.module)
                assert all(hasattr(module, each.name) for each in node.names), ast.unparse(node)


@pytest.mark.parametrize("page", TEXTS)
def test_links_lead_somewhere(page: str) -> None:
    text = re.sub(r"^ *```.*?^ *```$", "", TEXTS[page], flags=re.DOTALL | re.MULTILINE)
    for link in re.findall(r"\]\(([^)\s]*)\)", re.sub(r"`[^`\n]*`", "", text)):
        if ours := re.match(OURS + r"(?:blob/)?main/([^#]*)", link):
            assert (ROOT / ours[1]).exists(), link
        elif not link.startswith("#") and ":" not in link:  # mkdocs checks anchors
            file = (PAGES[0].parent / page).parent / link.partition("#")[0]
            assert file.exists() or file.name == "commands.md", link  # which is made when the pages are built
        elif ":" in link:
            assert re.match(r"https://[\w.-]+\.\w+(/[\w./@#%-]*)?$", link), link


def paths(text: str) -> Iterator[str]:
    """The paths of this repository that a page names in back-ticks or in a shell block.

    A path begins with a folder of the repository, or ends in `.py`, or begins with a room and has no suffix.
    """
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"^ *```.*?^ *```$", "", text, flags=re.DOTALL | re.MULTILINE))
    for word in (word for line in (*spans, *shell_lines(text)) for word in line.split()):
        first, slash, _ = word.partition("/")
        if not re.fullmatch(r"[\w./-]+", word):
            continue
        if (slash and first in FOLDERS) or word.endswith(".py") or (slash and first in ROOMS and "." not in word):
            yield word


FOLDERS = {path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".")}
PACKAGES = [ROOT / "plugin/optimum/streamline", ROOT / "exporters/optimum/exporters/streamline"]
ROOMS = {path.name for package in PACKAGES for path in package.iterdir() if path.is_dir()}
# Files that a reader makes, and one that a message names.
NOT_OURS = {"last_layers.py", "parts_own.py"}


@pytest.mark.parametrize("page", TEXTS)
def test_paths_of_the_repository_exist(page: str) -> None:
    files = {str(file.relative_to(ROOT)) for folder in FOLDERS for file in (ROOT / folder).rglob("*.py")}
    bases = [ROOT, *PACKAGES, ROOT / "plugin/optimum"]
    for path in paths(TEXTS[page]):
        ends_a_path = any(f"/{file}".endswith(f"/{path}") for file in files)
        assert path in NOT_OURS or ends_a_path or any((base / path).exists() for base in bases), path


def test_a_path_that_does_not_exist_is_noticed() -> None:
    sentence = "`ci/no_such_file`, `methods/names.py`, `tensorrt/graph`, `out/`, `onnx/export.log`\n"
    text = f"{sentence}```bash\nbash ci/test tests/no\n```\n"
    assert list(paths(text)) == ["ci/no_such_file", "methods/names.py", "tensorrt/graph", "ci/test", "tests/no"]


def test_the_table_of_options_has_every_option(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mkdocs")
    monkeypatch.syspath_prepend(str(ROOT / "ci"))
    hooks = importlib.import_module("docs_hooks")
    assert TEXTS["docs/reference/recipe.md"].count(hooks.OPTIONS_MARKER) == 1
    table = hooks.option_tables()
    assert re.findall(r"^\| `(\w+)` \| `(--[\w-]+)` \|", table, re.MULTILINE) == [
        (option.name, option.flag) for group in (*GROUPS, "") for option in OPTIONS.values() if option.group == group
    ]
    assert "| `seed` | `--seed` | `0` |" in table
    assert "| `lora` | `--lora` | off |" in table


def test_pages_that_must_be_short_are() -> None:
    assert len(TEXTS["README.md"].splitlines()) <= 150
    assert len(TEXTS["docs/glossary.md"].splitlines()) <= 30


def test_every_command_is_on_the_first_page() -> None:
    assert set(re.findall(r"`optimum-cli streamline (\S+)", TEXTS["docs/index.md"])) == COMMANDS


def test_the_picture_shows_the_figures_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "ci"))
    picture = importlib.import_module("picture")
    drawn = picture.PICTURE.read_text(encoding="utf-8")
    again = picture.picture(picture.read_table(TEXTS["README.md"]), 16, {})
    bars = drawn[drawn.index(">Perplexity") :]
    assert bars == again[again.index(">Perplexity") :]


def test_the_picture_shows_what_a_packed_plan_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "ci"))
    picture = importlib.import_module("picture")
    layers = [
        {"layer": 0, "originals": [0, 2], "kind": "packed", "attention": 0, "mlp": 2},
        {"layer": 1, "originals": [3], "kind": "thinned"},
    ]
    record = {"source": {"layers": 4}, "layers": layers, "dead": {"1": ["attention"]}}
    assert picture.removed_sublayers(record) == {
        "0": ["mlp"],
        "1": ["attention", "mlp"],
        "2": ["attention"],
        "3": ["attention"],
    }


def test_the_picture_shows_what_was_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "ci"))
    picture = importlib.import_module("picture")
    layers = [{"layer": 0, "originals": [0, 1, 2], "kind": "merged"}, {"layer": 1, "originals": [3], "kind": "kept"}]
    removed = picture.removed_sublayers({"source": {"layers": 4}, "layers": layers, "dead": {}})
    assert removed == {str(layer): [] for layer in range(4)}
    drawn = picture.picture(picture.read_table(TEXTS["README.md"]), 4, removed, [[0, 1, 2]])
    assert "A model of 4 layers: 3 merged into 1, the rest healed" in drawn
    assert drawn.count(f'fill="{picture.MERGED}"') == 2  # an attention and an MLP


def test_the_mutants_are_of_code_and_tests_that_exist() -> None:
    tests = "\n".join(file.read_text(encoding="utf-8") for file in (ROOT / "tests").rglob("test_*.py"))
    rows = re.findall(r"^\| `(.+?)` \| `(.+?)` \| `.+?` \| \w+ \| `(\w+)` \|$", TEXTS["docs/mutants.md"], re.MULTILINE)
    assert len(rows) >= 20
    for name, code, test in rows:
        [file] = [package / name for package in PACKAGES if (package / name).is_file()]
        assert file.read_text(encoding="utf-8").count(code) == 1, code
        assert f"def {test}(" in tests, test
