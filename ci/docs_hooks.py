"""What mkdocs does beyond its own: the page of commands from their `--help`, and links to files outside docs/."""

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

ROOT = Path(__file__).parents[1]
OUTSIDE = re.compile(r"\]\((?:\.\./)+([^)#]+)((?:#[^)]*)?)\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add `reference/commands.md`, which the commands write themselves."""
    files.append(File.generated(config, "reference/commands.md", content=commands_page()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead a link to a file of the repository outside docs/ to GitHub, where both exist."""
    folder = (ROOT / "docs" / page.file.src_uri).parent

    def outside(link: re.Match[str]) -> str:
        target = (folder / link[0][2:].partition("#")[0].rstrip(")")).resolve()
        if target.is_relative_to(ROOT / "docs") or not target.exists():
            return link[0]  # mkdocs checks these, and complains of the second
        return f"]({config.repo_url}/blob/main/{target.relative_to(ROOT)}{link[2]})"

    return OUTSIDE.sub(outside, markdown)


def commands_page() -> str:
    """Every command's `--help`, as the command prints it."""
    parts = [
        "# Commands",
        "This page is what `--help` prints. Flags of `run`, `prune`, `score` and `orthogonality` are also keys of a "
        "[recipe](recipe.md).",
    ]
    for command in StreamlineCommand.SUBCOMMANDS:
        parts += [f"## {command.name}", f"```text\n{_help('streamline', command.name)}\n```"]
    return "\n\n".join(parts) + "\n"


def _help(*words: str) -> str:
    command = [sys.executable, "-m", "optimum.commands.optimum_cli", *words, "--help"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, "COLUMNS": "100"})
    return done.stdout.strip()
