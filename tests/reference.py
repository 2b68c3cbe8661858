"""The trained reference model, for everything that is about quality."""

from pathlib import Path

REFERENCE = str(Path(__file__).parent.parent / "examples" / "reference_model")
VOCABULARY = 4096
# The text that each command takes by default is on the Hub: the tests name one that is always there.
LIBRARY = {
    "score": ("--calibration", "stdlib"),
    "prune": ("--calibration", "stdlib"),
    "run": ("--calibration", "stdlib", "--eval-data", "stdlib"),
    "orthogonality": ("--calibration", "stdlib", "--eval-data", "stdlib"),
    "validate": ("--eval-data", "stdlib"),
    "export": (),  # only quantizers that need calibration text take any
}
HEALED = ("--heal-data", "stdlib")  # of what is trained, besides
