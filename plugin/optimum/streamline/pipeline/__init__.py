"""The steps of the commands `prune`, `quantize`, `run`, `validate` and `orthogonality`; `score` is in `prune.py`.

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
