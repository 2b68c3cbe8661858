"""Token windows of one fixed length, drawn from a text: the same ones for the same seed.

Knows text and tokenizers; of a model only how many tokens it knows. How windows are drawn is in `sampling.py`.
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


# Of an endless text at least so many characters are read, and so many times what the windows take.
READ, READ_TIMES = 16_000_000, 8


class TooShortError(StreamlineError):
    """A text has fewer tokens than windows are asked of it."""


@dataclass(frozen=True)
class Windows:
    """Windows of tokens, and where they come from.

    Args:
        ids: Token ids `[windows, length]`.
        spec: The text SPEC.
        documents: Of each window, the number of the document that its text begins in; empty where that is not known.
        prefix: The tokens that every window begins with, because the tokenizer begins a text with them.
        separator: The tokens between two documents.
        possible: How many windows the text had room for, of which these were drawn; 0 where that is not known.
        commit: Of a data set on the Hub, the commit that was read; empty where that is not known.
        characters: How many characters of the text were read, from which these were drawn; 0 where that is not known.
        whole: Whether that is all of the text: of a large data set on the Hub only so much is read.
        texts: The text that the windows were made from.
        sketch: What all the text that they could have been drawn from is known again by.
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

    def part(self, start: int, end: int) -> Windows:
        """The windows from `start` up to `end`."""
        return replace(self, ids=self.ids[start:end], documents=self.documents[start:end])

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the token ids: the same windows have the same one."""
        return hashlib.sha256(self.ids.to(torch.int32).numpy().tobytes()).hexdigest()

    def describe(self) -> dict[str, Any]:
        """What a record and a report say of these windows; of the text itself, what is known."""
        count, length = self.ids.shape
        known: dict[str, Any] = {"commit": self.commit} if self.commit else {}
        if self.possible:
            known |= {"possible": self.possible, "documents": len(set(self.documents)), "prefix": list(self.prefix)}
            known |= {"separator": list(self.separator), "read_characters": self.characters, "whole": self.whole}
        return {"spec": self.spec, "windows": count, "length": length, "fingerprint": self.fingerprint, **known}

    def line(self, purpose: str) -> str:
        """What a command says of these windows.

        Args:
            purpose: What the text is for, such as `calibration`.
        """
        count, length = self.ids.shape
        commit = f" at {self.commit}" if self.commit else ""
        some = "" if self.whole else f" in the first {self.characters:,} characters that were read of it"
        drawn = f"drawn from {self.possible:,}{some}"
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
    """Windows of `length` tokens, drawn by `seed` over a text; every one begins as the tokenizer begins a text.

    A window that holds the end of a document goes on with the next, what the tokenizer ends and begins a text with
    between them. Of a data set on the Hub no more is read, and drawn from, than `READ` and `READ_TIMES` say.

    Args:
        vocabulary: How many tokens the model knows that is to read them.
        part: The part that a bare `stdlib` stands for.

    Raises:
        TooShortError: the text is too short.
        StreamlineError: it cannot be read, or the tokenizer is not one for this text and this model.
    """
    text = open_text(f"stdlib:{part}" if spec == "stdlib" else spec, seed)
    writer = WindowEncoder(tokenizer)
    if length <= len(writer.prefix):
        raise StreamlineError(f"length {length}: the tokenizer begins a text with {len(writer.prefix)} tokens")
    book, whole, a_token = _read(text, tokenizer, writer, count * length)
    drawn = sample_windows(book, writer, count, length, a_token, seed) if book.size else SampledWindows([], 0)
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
        prefix=tuple(writer.prefix),
        separator=tuple(writer.ending + writer.prefix),
        possible=drawn.possible,
        commit=text.commit,
        characters=book.size,
        whole=whole,
        texts=tuple(dict.fromkeys(text for window in drawn.windows for text in window.texts)),
        sketch=sketch_of(book.documents),
    )


def _read(
    text: Text, tokenizer: PreTrainedTokenizerBase, writer: WindowEncoder, tokens: int
) -> tuple[JoinedText, bool, float]:
    """All of a text, or of an endless one enough for so many tokens; whether it is all; and characters a token."""
    documents: list[str] = []
    size, enough, whole = 0, READ, True
    for document in text.documents:
        if text.endless and size >= enough:
            enough = max(
                READ, int(READ_TIMES * tokens * _characters_a_token(text, tokenizer, writer, JoinedText(documents)))
            )
            if size >= enough:
                whole = False
                break
        documents.append(document)
        size += len(document)
    book = JoinedText(documents)
    return book, whole, _characters_a_token(text, tokenizer, writer, book) if book.size else 0.0


def _characters_a_token(
    text: Text, tokenizer: PreTrainedTokenizerBase, writer: WindowEncoder, book: JoinedText
) -> float:
    sample = book.sample()
    texts = [piece for piece, _ in sample]
    tokens = [token for encoded in writer.encode(texts) for token in encoded]
    check_tokenizer(text.spec, tokenizer, texts, tokens)
    between = sum(closes for _, closes in sample) * len(writer.ending + writer.prefix)
    return sum(map(len, texts)) / (len(tokens) + between)


def seen_text(windows: Windows) -> dict[str, Any]:
    """What a record says of text that choices were made on: enough to know all of it again by what it says."""
    return {**windows.describe(), "sketch": windows.sketch.to_dict()}
