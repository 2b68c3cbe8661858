"""The work behind the commands and the Python API: each command's steps, in order.

`prune.py` (with `score`), `quantize.py`, `run.py`, `orthogonality.py` and `validation.py` hold one command each. They
share the other files: `preflight.py` checks the recipe, `texts.py` reads the texts, `planning.py` loads a model and
plans, `larger_than_memory.py` leaves its weights on disk if they do not fit, `write_checkpoint.py` writes the pruned
model, `exporting.py` calls the exporters, and `estimating.py` says what all this will take.
"""

__all__ = [
    "estimating",
    "exporting",
    "larger_than_memory",
    "orthogonality",
    "planning",
    "preflight",
    "prune",
    "quantize",
    "run",
    "texts",
    "validation",
    "write_checkpoint",
]
