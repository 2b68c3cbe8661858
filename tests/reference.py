"""The trained reference model, for everything that is about quality."""

from pathlib import Path

REFERENCE = str(Path(__file__).parent.parent / "examples" / "reference_model")
VOCABULARY = 4096
