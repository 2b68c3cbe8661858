"""Models on disk: where a checkpoint is fetched from, which files belong to it, how it is loaded, saved and read back,
what is recorded beside it. An export on disk (`artifact.py`) is here too.
"""

__all__ = [
    "adapters",
    "artifact",
    "loading",
    "model_in_memory",
    "provenance",
    "read_back",
    "record_file",
    "remote_code",
    "saving",
    "source",
    "transformers4_config",
    "transformers4_tokenizer",
    "upload",
    "weight_files",
    "wrong_folders",
]
