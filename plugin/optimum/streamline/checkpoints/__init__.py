"""Models on disk: fetch, load, check, save and compare checkpoints, and read the records beside them.

An export's description (`artifact.py`) is here too.
"""

__all__ = [
    "adapters",
    "artifact",
    "hub",
    "loading",
    "model_in_memory",
    "provenance",
    "read_back",
    "record_file",
    "remote_code",
    "saving",
    "source",
    "tokenizer_files",
    "transformers4_config",
    "transformers4_tokenizer",
    "upload",
    "weight_files",
    "wrong_folders",
]
