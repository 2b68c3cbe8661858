"""A missing extra is one line that says how to get it, before any work is done."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from reference import REFERENCE

pytestmark = pytest.mark.onnx  # it is taken away, so it has to be there

# A process in which a package is not installed: importing it fails as it then would.
WITHOUT = """
import sys
for name in sys.argv.pop(1).split(","):
    sys.modules[name] = None
from optimum.commands.optimum_cli import main
main()
"""


@pytest.mark.parametrize(
    ("command", "without", "extra"),
    [
        (("export",), "onnx", "onnx"),
        (("export",), "onnxscript", "onnx"),
        (("export",), "onnxruntime", "onnx"),
        (("export", "--format", "tensorrt"), "onnxscript", "tensorrt"),
        (("run", "--remove", "4", "--format", "onnx"), "onnxruntime", "onnx"),
    ],
)
def test_a_missing_package_names_its_extra(tmp_path: Path, command: tuple[str, ...], without: str, extra: str) -> None:
    words = ["optimum-cli", "streamline", *command, "-m", REFERENCE, str(tmp_path / "out")]
    script = f"import sys; sys.argv = {[words[0], without, *words[1:]]!r}\n{WITHOUT}"
    done = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == f'error: this needs the package {without}: pip install "optimum-streamline[{extra}]"\n'
    assert list(tmp_path.iterdir()) == []
