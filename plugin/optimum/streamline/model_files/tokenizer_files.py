"""The file name patterns of a tokenizer in a checkpoint folder."""

from __future__ import annotations

from pathlib import Path

# Every tokenizer has at least one of these.
_VOCABULARY_FILES = ("tokenizer*", "vocab*", "merges.txt", "spiece.model", "sentencepiece*")
TOKENIZER_FILES = (*_VOCABULARY_FILES, "special_tokens_map.json", "added_tokens.json", "chat_template*", "*.model")
"""All files that decide how a tokenizer reads text, with the chat template."""


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer."""
    return any(any(folder.glob(pattern)) for pattern in _VOCABULARY_FILES)
