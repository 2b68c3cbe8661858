"""Text for calibration, healing and evaluation: from a SPEC to documents, from documents to windows of tokens, and
whether two texts overlap.
"""

__all__ = ["files", "overlap", "sampling", "sources", "tokenizer_checks", "windows"]
