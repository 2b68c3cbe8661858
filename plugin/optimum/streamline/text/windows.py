"""Windows: token sequences of one fixed length, drawn at random from a text. The same seed draws the same windows.

`sampling.py` chooses where windows begin.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from optimum.streamline.errors import StreamlineError

from .overlap import Sketch, sketch_of
from .sampling import JoinedText, SampledWindows, WindowEncoder, sample_windows
from .sources import Text, open_text
from .tokenizer_checks import check_tokenizer, check_vocabulary

BATCH = 4
"""The number of windows that a model computes at once."""
LOGITS = 1 << 25
"""The most logits in memory at a time, but for a single token or window: 134 MB in fp32."""

# How much of an endless text is read: at least this many characters, and at least this many times the characters that
# the windows take.
MIN_CHARACTERS, OVERSAMPLING = 16_000_000, 8


def logit_batch(length: int, vocabulary: int) -> int:
    """The number of windows whose logits a model computes at once: at most `BATCH`, and `LOGITS` logits.

    Args:
        length: The tokens of a window.
        vocabulary: The logits of a token.
    """
    return min(BATCH, max(1, LOGITS // (length * vocabulary)))


def window_generator(seed: int, place: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator for the draws of one window, so that they are the same in any batch.

    Args:
        seed: The seed of the recipe.
        place: The number of the window in its text.
        device: The device of the draws.
    """
    return torch.Generator(device).manual_seed((seed * 1_000_003 + place) % 2**63)


class TooShortError(StreamlineError):
    """A text has room for fewer windows than were asked for."""


@dataclass(frozen=True)
class Windows:
    """Windows of token ids, and their source.

    Args:
        ids: Token ids `[windows, length]`.
        spec: The SPEC of the text.
        documents: For each window, the index of the document in which its text begins; empty if unknown.
        prefix: The tokens at the start of every window, because the tokenizer puts them before every text.
        separator: The tokens between two documents.
        possible: The number of windows that the text had room for, from which these were drawn; 0 if unknown.
        commit: For a data set on the Hub, the commit that was read; empty if unknown.
        characters: The number of characters that were read; 0 if unknown.
        whole: Whether the text was read completely. A large data set on the Hub is not.
        texts: The pieces of text that were tokenized for the windows.
        sketch: The sketch of all text that was read, to find overlap with other texts.
        sampled: For text that the original sampled, what it was sampled from (`Prompts.describe`); else empty.
    """

    ids: torch.Tensor
    spec: str
    documents: tuple[int, ...] = ()
    prefix: tuple[int, ...] = ()
    separator: tuple[int, ...] = ()
    possible: int = 0
    commit: str = ""
    characters: int = 0
    whole: bool = True
    texts: tuple[str, ...] = field(default=(), repr=False)
    sketch: Sketch = field(default=Sketch(), repr=False)
    sampled: dict[str, Any] = field(default_factory=dict, repr=False)

    def part(self, start: int, end: int) -> Windows:
        """The windows from `start` up to, not including, `end`."""
        return replace(self, ids=self.ids[start:end], documents=self.documents[start:end])

    def halves(self) -> tuple[Windows, Windows]:
        """The first and the second half of the windows; a single window is both."""
        total = len(self.ids)
        middle = total // 2
        return (self, self) if total == 1 else (self.part(0, middle), self.part(middle, total))

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the token ids. Equal windows have equal fingerprints."""
        return hashlib.sha256(self.ids.to(torch.int32).numpy().tobytes()).hexdigest()

    def describe(self) -> dict[str, Any]:
        """The fields about these windows in a record or report, without unknown ones."""
        count, length = self.ids.shape
        known: dict[str, Any] = {"commit": self.commit} if self.commit else {}
        known |= {"sampled": self.sampled} if self.sampled else {}
        if self.possible:
            known |= {"possible": self.possible, "documents": len(set(self.documents)), "prefix": list(self.prefix)}
            known |= {"separator": list(self.separator), "read_characters": self.characters, "whole": self.whole}
        return {"spec": self.spec, "windows": count, "length": length, "fingerprint": self.fingerprint, **known}

    def line(self, purpose: str) -> str:
        """The line about these windows that a command prints.

        Args:
            purpose: What the text is used for, such as `calibration`.
        """
        count, length = self.ids.shape
        commit = f" at {self.commit}" if self.commit else ""
        part = "" if self.whole else f" in the first {self.characters:,} characters that were read"
        drawn = f"drawn from {self.possible:,} possible ones{part}"
        return f"{purpose} text: {self.spec}{commit}, {count} windows of {length} tokens {drawn}"


def read_windows(
    spec: str,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    length: int,
    seed: int,
    vocabulary: int,
    part: str = "eval",
) -> Windows:
    """Read a text and draw windows from it.

    Every window begins with the tokens that the tokenizer puts before a text. A window that reaches the end of a
    document continues with the next one, with the separator tokens between them. Of a data set on the Hub, only as much
    is read as `MIN_CHARACTERS` and `OVERSAMPLING` ask for.

    Args:
        spec: The SPEC of the text.
        tokenizer: The tokenizer.
        count: The number of windows.
        length: The number of tokens in each window.
        seed: The seed that decides which windows are drawn.
        vocabulary: The number of token ids that the model knows.
        part: The part of the standard library that the SPEC `stdlib` stands for.

    Returns:
        The windows.

    Raises:
        TooShortError: the text has fewer than `count` windows.
        StreamlineError: the text cannot be read, or the tokenizer does not fit the text or the model.
    """
    text = open_text(f"stdlib:{part}" if spec == "stdlib" else spec, seed)
    encoder = WindowEncoder(tokenizer)
    if length <= len(encoder.prefix):
        raise StreamlineError(
            f"length {length}: must be more than the {len(encoder.prefix)} tokens that the tokenizer puts before a text"
        )
    joined, whole, chars_per_token = _read(text, tokenizer, encoder, count * length)
    drawn = (
        sample_windows(joined, encoder, count, length, chars_per_token, seed) if joined.size else SampledWindows([], 0)
    )
    if not drawn.windows:
        raise TooShortError(
            f"text SPEC {text.spec!r}: {drawn.tokens} tokens, too short for {count} windows of {length}; "
            f"ask for at most {drawn.possible} windows, shorter ones, or give more text"
        )
    ids = torch.tensor([window.tokens for window in drawn.windows])
    check_vocabulary(tokenizer, int(ids.max()), vocabulary)
    return Windows(
        ids,
        text.spec,
        documents=tuple(window.document for window in drawn.windows),
        prefix=tuple(encoder.prefix),
        separator=tuple(encoder.ending + encoder.prefix),
        possible=drawn.possible,
        commit=text.commit,
        characters=joined.size,
        whole=whole,
        texts=tuple(dict.fromkeys(text for window in drawn.windows for text in window.texts)),
        sketch=sketch_of(joined.documents),
    )


def _read(
    text: Text, tokenizer: PreTrainedTokenizerBase, encoder: WindowEncoder, tokens: int
) -> tuple[JoinedText, bool, float]:
    """Read all of a text, or enough of an endless one to draw `tokens` tokens from.

    Returns:
        The text, whether it was read completely, and its average number of characters per token.
    """
    documents: list[str] = []
    size, enough, whole = 0, MIN_CHARACTERS, True
    for document in text.documents:
        if text.endless and size >= enough:
            enough = max(
                MIN_CHARACTERS,
                int(OVERSAMPLING * tokens * _characters_per_token(text, tokenizer, encoder, JoinedText(documents))),
            )
            if size >= enough:
                whole = False
                break
        documents.append(document)
        size += len(document)
    joined = JoinedText(documents)
    return joined, whole, _characters_per_token(text, tokenizer, encoder, joined) if joined.size else 0.0


def _characters_per_token(
    text: Text, tokenizer: PreTrainedTokenizerBase, encoder: WindowEncoder, joined: JoinedText
) -> float:
    """The average number of characters per token, estimated on a sample of the text."""
    sample = joined.sample()
    texts = [piece for piece, _ in sample]
    tokens = [token for encoded in encoder.encode(texts) for token in encoded]
    check_tokenizer(text.spec, tokenizer, texts, tokens)
    between = sum(closes for _, closes in sample) * len(encoder.ending + encoder.prefix)
    return sum(map(len, texts)) / (len(tokens) + between)


def seen_text(windows: Windows) -> dict[str, Any]:
    """Describe text that a model was made with, for its record.

    Args:
        windows: The windows that were drawn from the text.

    Returns:
        The fields of `describe`, and the sketch that recognizes all of the text later.
    """
    return {**windows.describe(), "sketch": windows.sketch.to_dict()}
