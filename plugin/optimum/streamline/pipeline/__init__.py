"""The work behind the commands and the Python API: each command's steps, in order.

`prune.py` (with `score`), `quantize.py`, `run.py`, `orthogonality.py` and `validation.py` hold one command each. They
share the other files: `preflight.py` checks the recipe, `texts.py` reads the texts, `planning.py` loads a model and
plans, `larger_than_memory.py` leaves its weights on disk if they do not fit, `healing_memory.py` estimates what healing
takes, `write_checkpoint.py` writes the pruned model, and `exporting.py` calls the exporters.
"""

__all__ = [
    "exporting",
    "healing_memory",
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
