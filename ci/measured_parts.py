"""The frame of a benchmark of several parts: which are asked for, what was measured before, and the page of it all."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from optimum.streamline.system.environment import describe_machine

Part = Callable[[Path], Any]


def measure_parts(
    description: str | None, parts: Mapping[str, Part], results_file: Path, write_page: Callable[[dict[str, Any]], None]
) -> None:
    """Read the command line, measure what was asked for, keep it beside what was measured before, and write the page.

    Args:
        description: What `--help` says.
        parts: What measures each part, given an empty folder of its own; its figures go to JSON.
        results_file: The JSON file of all figures.
        write_page: Writes the page from them.
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
