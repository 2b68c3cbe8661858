"""Loading, checking, saving and comparing checkpoints, and the records beside them."""

__all__ = ["finite_weights", "loading", "model_in_memory", "provenance", "read_back", "record_file", "saving", "upload"]
