"""Text into token windows of one fixed length, the same ones for the same seed.

Knows tokenizers and `text.py`, no model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from transformers import PreTrainedTokenizerBase

from .errors import StreamlineError
from .text import read_documents

# Text is compared by runs of this many tokens, of which one in so many is kept: those whose hash says so.
RUN, KEPT = 32, 32
# Code and prose repeat themselves, licences and headings above all: shared text is more than this share of the runs.
SHARED = 0.05
# Runs hashed at once.
_CHUNK = 65_536


class TooShortError(StreamlineError):
    """A text has fewer tokens than windows are asked of it."""


@dataclass(frozen=True)
class Windows:
    """Windows of tokens, and where they come from.

    Args:
        ids: Token ids `[windows, length]`.
        spec: The text SPEC.
    """

    ids: torch.Tensor
    spec: str

    def part(self, start: int, end: int) -> Windows:
        """The windows from `start` up to `end`."""
        return Windows(self.ids[start:end], self.spec)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the token ids: the same windows have the same one."""
        return hashlib.sha256(self.ids.to(torch.int32).numpy().tobytes()).hexdigest()

    def describe(self) -> dict[str, str | int]:
        """What a report says of these windows."""
        count, length = self.ids.shape
        return {"spec": self.spec, "windows": count, "length": length, "fingerprint": self.fingerprint}

    def runs(self) -> frozenset[int]:
        """Hashes of a sample of the text's runs of `RUN` tokens: the same ones wherever the same text stands.

        Sampling by hash value, not by place: Manber, "Finding similar files in a large file system" (1994).
        """
        flat = self.ids.flatten().numpy().astype(np.uint64)
        factors = np.random.default_rng(0).integers(1, 2**63, RUN, dtype=np.uint64) | np.uint64(1)
        found: set[int] = set()
        for start in range(0, len(flat) - RUN + 1, _CHUNK):
            view = sliding_window_view(flat[start : start + _CHUNK + RUN - 1], RUN)
            hashes = (view * factors).sum(axis=1, dtype=np.uint64)
            hashes ^= hashes >> np.uint64(32)
            found.update((hashes[hashes % np.uint64(KEPT) == 0] >> np.uint64(16)).tolist())
        return frozenset(found)


def read_windows(
    spec: str, tokenizer: PreTrainedTokenizerBase, count: int, length: int, seed: int, part: str = "eval"
) -> Windows:
    """The first `count` windows of `length` tokens of a text, its documents in an order that `seed` decides.

    Documents are joined end to end, each with the special tokens its tokenizer gives it and an end token.

    Args:
        part: The part that a bare `stdlib` stands for.

    Raises:
        TooShortError: the text is too short.
        StreamlineError: it cannot be read.
    """
    if spec == "stdlib":
        spec = f"stdlib:{part}"
    tokens: list[int] = []
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for document in read_documents(spec, seed):
        tokens += tokenizer(document, truncation=False, verbose=False)["input_ids"] + end
        if len(tokens) >= count * length:
            break
    else:
        raise TooShortError(
            f"text SPEC {spec!r}: {len(tokens)} tokens, too short for {count} windows of {length}; "
            f"ask for at most {len(tokens) // length} windows, shorter ones, or give more text"
        )
    return Windows(torch.tensor(tokens[: count * length]).view(count, length), spec)


def check_disjoint(chosen_on: Collection[int], chosen_spec: str, judged_on: Windows) -> None:
    """Refuse to judge on text that the choices were made on.

    Args:
        chosen_on: `Windows.runs` of the text of the choices.
        chosen_spec: Its SPEC, for the message.

    Raises:
        StreamlineError: more than `SHARED` of the evaluation text's runs stand in the other text too.
    """
    judged = judged_on.runs()
    share = len(judged.intersection(chosen_on)) / len(judged) if judged else 0.0
    if share > SHARED:
        raise StreamlineError(
            f"eval-data {judged_on.spec!r} shares {share:.0%} of its text with {chosen_spec!r}, "
            "which the choices are made on; give other text"
        )
