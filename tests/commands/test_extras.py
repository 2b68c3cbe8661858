"""A missing extra is one line that says how to get it, before any work is done."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from reference import REFERENCE

pytestmark = pytest.mark.onnx  # it is taken away, so it has to be there

# A process that runs one command after the other. In each, one package is not installed: to import it fails as it then
# would.
SCRIPT = """
import contextlib, io, json, sys
from optimum.commands.optimum_cli import main

answers = []
for words, without in json.loads(sys.argv[1]):
    sys.argv = ["optimum-cli", "streamline", *words]
    sys.modules[without] = None
    code = None
    with contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            main()
        except SystemExit as end:
            code = end.code
    del sys.modules[without]
    answers.append((code, said.getvalue()))
print(json.dumps(answers))
"""
CASES = (
    (("export",), "onnx", "onnx"),
    (("export",), "onnxscript", "onnx"),
    (("export",), "onnxruntime", "onnx"),
    (("export", "--format", "tensorrt"), "onnxscript", "tensorrt"),
    (("run", "--remove", "4", "--format", "onnx"), "onnxruntime", "onnx"),
)


def test_a_missing_package_names_its_extra(tmp_path: Path) -> None:
    commands = [([*words, "-m", REFERENCE, str(tmp_path / "out")], without) for words, without, _ in CASES]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(commands)], check=True, capture_output=True, text=True
    )
    assert json.loads(done.stdout.splitlines()[-1]) == [
        [2, f'error: this needs the package {without}: pip install "optimum-streamline[{extra}]"\n']
        for _, without, extra in CASES
    ]
    assert list(tmp_path.iterdir()) == []
