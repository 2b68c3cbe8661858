"""Hooks of mkdocs: they write the page of commands and the table of options, and lead links outside docs/ to GitHub."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from optimum.commands.streamline import StreamlineCommand
from optimum.streamline.recipe.options import DefinedOption, summary_of
from optimum.streamline.recipe.recipe import GROUPS, OPTIONS

ROOT = Path(__file__).parents[1]
OPTIONS_MARKER = "<!-- options: ci/docs_hooks.py writes this table when the pages are built -->"
OUTSIDE = re.compile(r"\]\((?:\.\./)+([^)#]+)((?:#[^)]*)?)\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated page `reference/commands.md`."""
    files.append(File.generated(config, "reference/commands.md", content=commands_page()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Put the table of options where its marker is, and lead links to files outside docs/ to GitHub."""
    markdown = markdown.replace(OPTIONS_MARKER, option_tables())
    folder = (ROOT / "docs" / page.file.src_uri).parent

    def outside(link: re.Match[str]) -> str:
        target = (folder / link[0][2:].partition("#")[0].rstrip(")")).resolve()
        if target.is_relative_to(ROOT / "docs") or not target.exists():
            return link[0]  # mkdocs checks these itself; a file that does not exist is an error
        return f"]({config.repo_url}/blob/main/{target.relative_to(ROOT)}{link[2]})"

    return OUTSIDE.sub(outside, markdown)


def commands_page() -> str:
    """Every command's `--help`, as the command prints it."""
    parts = [
        "# Commands",
        "This page shows the `--help` of every command. It is generated from the program when the pages are built.",
        "`run`, `prune`, `score`, `orthogonality` and `validate` take their options from one definition. The same "
        "options are keys of a [recipe](recipe.md#all-options).",
    ]
    for command in StreamlineCommand.SUBCOMMANDS:
        parts += [f"## {command.name}", f"```text\n{_help('streamline', command.name)}\n```"]
    return "\n\n".join(parts) + "\n"


def option_tables() -> str:
    """One table for each group of the recipe, from the definition of its options: key, flag, default and meaning."""
    parts = []
    for group in (*GROUPS, ""):
        title = f"### `{group}`" if group else "### Beside the groups"
        summary = summary_of(GROUPS[group]) if group else "Options that all steps share."
        rows = [_option_row(each) for each in OPTIONS.values() if each.group == group]
        parts += [title, summary, "\n".join(["| key | flag | default | meaning |", "|---|---|---|---|", *rows])]
    return "\n\n".join(parts)


def _option_row(defined: DefinedOption) -> str:
    meaning = defined.option.help
    if defined.choices:
        meaning += f" One of {', '.join(f'`{each}`' for each in defined.choices)}."
    if defined.option.default:
        default = defined.option.default
    elif defined.default is None or defined.default is False:
        default = "off" if defined.types == (bool,) else "not set"
    else:
        default = f"`{defined.default}`"
    cells = (f"`{defined.name}`", f"`{defined.flag}`", default, meaning)
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _help(*words: str) -> str:
    command = [sys.executable, "-m", "optimum.commands.optimum_cli", *words, "--help"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, "COLUMNS": "100"})
    return done.stdout.strip()
