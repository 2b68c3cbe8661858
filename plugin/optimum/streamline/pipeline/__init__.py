"""The work of each command, step by step: prune, quantize, run, validate, orthogonality.

`preflight.py` holds what they check first, `texts.py` what they read, `prepared.py` and `checkpoint.py` the steps of
`prune.py` that work on a loaded model, and `exporting.py` the way to the exporters.
"""

__all__ = [
    "checkpoint",
    "exporting",
    "orthogonality",
    "preflight",
    "prepared",
    "prune",
    "quantize",
    "run",
    "texts",
    "validation",
]
