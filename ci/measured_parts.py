"""The command line of a benchmark with several parts: measure some of them, keep the figures, and write the page."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from optimum.streamline.system.environment import describe_machine

Part = Callable[[Path], Any]
"""A function that measures a part in an empty folder, and returns its figures."""


def measure_parts(
    description: str | None, parts: Mapping[str, Part], results_file: Path, write_page: Callable[[dict[str, Any]], None]
) -> None:
    """Read the command line, measure the parts that it names, add them to the earlier figures, and write the page.

    Args:
        description: The text of `--help`.
        parts: The function that measures each part, by name.
        results_file: The JSON file with the figures of all parts.
        write_page: The function that writes the page from the figures.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(parts))
    parser.add_argument("--page", action="store_true")
    args = parser.parse_args()
    results: dict[str, Any] = json.loads(results_file.read_text()) if results_file.is_file() else {}
    if not args.page:
        for name in [args.only] if args.only else parts:
            with tempfile.TemporaryDirectory() as scratch:
                results[name] = parts[name](Path(scratch))
            results["machine"] = describe_machine("cpu")
            results_file.write_text(json.dumps(results, indent=1) + "\n")
    write_page(results)
