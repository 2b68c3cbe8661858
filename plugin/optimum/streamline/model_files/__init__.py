"""The files of a model: fetching them, telling which belong to the model, merging adapters, and recognizing what kind
of folder a path is.

An export's description (`artifact.py`) is here too. `checkpoints` loads and saves models.
"""

__all__ = [
    "adapters",
    "artifact",
    "hub",
    "remote_code",
    "source",
    "tokenizer_files",
    "transformers4_config",
    "transformers4_tokenizer",
    "weight_files",
    "wrong_folders",
]
