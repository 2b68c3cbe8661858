"""Text for calibration, healing and evaluation.

Read documents from a SPEC (see `sources.py`), draw windows of tokens from them, check that a tokenizer fits, and find
overlap between two texts.
"""

__all__ = [
    "files",
    "overlap",
    "prompts",
    "replaced_tokens",
    "sampling",
    "sources",
    "tokenizer_checks",
    "window_file",
    "windows",
]
