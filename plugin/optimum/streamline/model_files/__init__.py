"""The files of a model: where they are fetched from, which of them count, adapters, and what a folder is.

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
