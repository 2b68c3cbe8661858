"""Text into token windows of one fixed length, the same ones for the same seed.

Knows tokenizers and `text.py`, no model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from .errors import StreamlineError
from .text import read_documents


@dataclass(frozen=True)
class Windows:
    """Windows of tokens, and what they were made from.

    Args:
        ids: Token ids `[windows, length]`.
        spec: The text SPEC.
        documents: SHA-256 of every document that went in, to prove two sets disjoint.
    """

    ids: torch.Tensor
    spec: str
    documents: frozenset[str]

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the token ids: the same windows have the same one."""
        return hashlib.sha256(self.ids.to(torch.int32).numpy().tobytes()).hexdigest()

    def describe(self) -> dict[str, str | int]:
        """What a record says of these windows."""
        count, length = self.ids.shape
        return {"spec": self.spec, "windows": count, "length": length, "fingerprint": self.fingerprint}


def read_windows(
    spec: str, tokenizer: PreTrainedTokenizerBase, count: int, length: int, seed: int, part: str = "eval"
) -> Windows:
    """The first `count` windows of `length` tokens of a text, its documents in an order that `seed` decides.

    Documents are joined end to end, each with the special tokens its tokenizer gives it and an end token.

    Args:
        part: The part that a bare `stdlib` stands for.

    Raises:
        StreamlineError: the text cannot be read, or is too short.
    """
    if spec == "stdlib":
        spec = f"stdlib:{part}"
    tokens: list[int] = []
    documents: set[str] = set()
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for document in read_documents(spec, seed):
        tokens += tokenizer(document, truncation=False, verbose=False)["input_ids"] + end
        documents.add(hashlib.sha256(document.encode()).hexdigest())
        if len(tokens) >= count * length:
            break
    else:
        raise StreamlineError(
            f"text SPEC {spec!r}: {len(tokens)} tokens, too short for {count} windows of {length}; "
            f"ask for at most {len(tokens) // length} windows, shorter ones, or give more text"
        )
    return Windows(torch.tensor(tokens[: count * length]).view(count, length), spec, frozenset(documents))


def check_disjoint(chosen_on: Windows, judged_on: Windows) -> None:
    """Refuse to judge on text that the choices were made on.

    Raises:
        StreamlineError: the two share a document.
    """
    shared = len(chosen_on.documents & judged_on.documents)
    if shared:
        raise StreamlineError(
            f"eval-data {judged_on.spec!r} shares {shared} documents with {chosen_on.spec!r}, "
            "which the choices are made on; give other text"
        )


def batches(windows: torch.Tensor, size: int) -> Iterator[torch.Tensor]:
    """Rows of `windows` `[n, length]` in batches of at most `size`."""
    yield from windows.split(size)
