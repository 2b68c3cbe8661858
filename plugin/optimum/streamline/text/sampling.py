"""Draw token windows at random positions of a text. Each begins as the tokenizer begins a text, for example with BOS.

Of a large text, only the drawn parts are tokenized; `datasets` can only draw whole rows.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import ceil

from transformers import PreTrainedTokenizerBase

# A text that has room for fewer windows than this many times the number asked for is tokenized completely.
FEW = 4
# The maximum distance in characters to search for the end of a word. Scripts such as Chinese have no spaces.
_LONGEST_WORD = 200
# The factor by which the characters for one window are increased, at first and each time they give too few tokens.
_MARGIN = 1.5
# The number of pieces in the sample that estimates characters per token, and the characters of each.
_SAMPLE_PIECES, _SAMPLE_CHARACTERS = 16, 4096


class JoinedText:
    """Documents laid end to end. An offset is a number of characters from the start of the first document.

    Args:
        documents: The documents.
    """

    def __init__(self, documents: Sequence[str]) -> None:
        self.documents = documents
        self._ends = list(accumulate(len(document) for document in documents))

    @property
    def size(self) -> int:
        """The number of characters."""
        return self._ends[-1] if self._ends else 0

    def document_at(self, offset: int) -> int:
        """The index of the document that contains an offset."""
        return bisect_right(self._ends, offset)

    def word_at(self, offset: int) -> int:
        """The first offset, from this one on, at which a document or the white space before a word begins.

        If there is none within `_LONGEST_WORD` characters, the offset itself.
        """
        if offset >= self.size:
            return self.size
        number = self.document_at(offset)
        text, start = self.documents[number], self._ends[number] - len(self.documents[number])
        first = offset - start
        if first == 0:
            return offset
        for at in range(first, min(first + _LONGEST_WORD, len(text))):
            if text[at].isspace() and not text[at - 1].isspace():
                return start + at
        return self._ends[number] if first + _LONGEST_WORD >= len(text) else offset

    def after_space(self, offset: int) -> int:
        """The offset after the white space character at this offset, or the offset itself if there is none."""
        if offset >= self.size:
            return offset
        number = self.document_at(offset)
        return offset + self.documents[number][offset - self._ends[number]].isspace()

    def pieces(self, start: int, end: int) -> Iterator[tuple[str, bool]]:
        """The text between two offsets, one piece per document.

        Args:
            start: Offset of the first character.
            end: Offset after the last character.

        Yields:
            A piece, and whether its document ends with it.
        """
        number = self.document_at(start)
        while start < end:
            document, close = self.documents[number], self._ends[number]
            begin = close - len(document)
            yield document[start - begin : end - begin], close <= end
            start, number = close, number + 1

    def sample(self) -> list[tuple[str, bool]]:
        """Pieces spread evenly over the text, in the form of `pieces`; the same ones in every call."""
        starts = sorted({self.word_at(self.size * part // _SAMPLE_PIECES) for part in range(_SAMPLE_PIECES)})
        ends = [
            min(start + _SAMPLE_CHARACTERS, after)
            for start, after in zip(starts, [*starts[1:], self.size], strict=True)
        ]
        return [piece for start, end in zip(starts, ends, strict=True) for piece in self.pieces(start, end)]


class WindowEncoder:
    """Encode pieces of text with a tokenizer, with the tokens that it puts before, between and after documents.

    Args:
        tokenizer: The tokenizer.

    Attributes:
        prefix: The tokens that it puts before a text, such as BOS; often none.
        ending: The tokens that close a document: the tokens that the tokenizer puts after a text, then EOS if it has
            one. If there are none and no prefix either, the tokens of an empty line.
        puts_space: Whether it puts a space before a text, as Llama's does. A window then begins after the text's own
            space.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        probe = "A text"
        framed: list[int] = tokenizer(probe)["input_ids"]
        [plain] = self.encode([probe])
        self.puts_space = "".join(tokenizer.convert_ids_to_tokens(plain)).startswith("▁")
        starts = range(len(framed) - len(plain) + 1)
        first = next((at for at in starts if framed[at : at + len(plain)] == plain), 0)
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        self.prefix = framed[:first]
        suffix = framed[first + len(plain) :]
        self.ending = suffix if suffix[-1:] == end else suffix + end
        if not self.prefix + self.ending:
            [self.ending] = self.encode(["\n\n"])

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Tokenize several texts without special tokens.

        Args:
            texts: The texts.

        Returns:
            The token ids of each text.
        """
        if not texts:
            return []
        encoded: list[list[int]] = self._tokenizer(texts, add_special_tokens=False, truncation=False, verbose=False)[
            "input_ids"
        ]
        return encoded

    def tokens(self, pieces: Sequence[tuple[str, bool]]) -> list[int]:
        """Tokenize consecutive pieces, with `ending` and `prefix` after each piece that ends its document.

        Args:
            pieces: Pieces in the form of `JoinedText.pieces`.

        Returns:
            The token ids of all pieces together.
        """
        tokens: list[int] = []
        for (_, closes), encoded in zip(pieces, self.encode([text for text, _ in pieces]), strict=True):
            tokens += encoded + (self.ending + self.prefix if closes else [])
        return tokens


@dataclass(frozen=True)
class Window:
    """One window of tokens.

    Args:
        tokens: Its token ids, beginning with the prefix.
        document: The index of the document in which its text begins.
        texts: The text that was tokenized for it, which can be longer than the window.
    """

    tokens: list[int]
    document: int
    texts: tuple[str, ...]


@dataclass(frozen=True)
class SampledWindows:
    """Drawn windows, in the order in which they were drawn.

    Args:
        windows: The windows; none if the text is too short.
        possible: The number of windows that the text has room for.
        tokens: The number of tokens in the text, if all of it was tokenized; else 0.
    """

    windows: list[Window]
    possible: int
    tokens: int = 0


def sample_windows(
    joined: JoinedText, encoder: WindowEncoder, count: int, length: int, chars_per_token: float, seed: int
) -> SampledWindows:
    """Draw windows without replacement. No two windows share text.

    Args:
        joined: The text.
        encoder: The encoder of the tokenizer.
        count: The number of windows.
        length: The number of tokens in each window, prefix included.
        chars_per_token: The estimated number of characters per token.
        seed: The seed of the random generator.

    Returns:
        The windows, or none if the text has fewer than `count`.
    """
    # The characters that one window takes, about.
    span = ceil((length - len(encoder.prefix)) * chars_per_token)
    possible = joined.size // span
    if possible >= FEW * count:
        windows = _draw_few(joined, encoder, count, length, span, random.Random(seed))
        if windows:
            return SampledWindows(windows, possible)
    return _draw_of_all(joined, encoder, count, length, random.Random(seed))


def _draw_few(
    joined: JoinedText, encoder: WindowEncoder, count: int, length: int, span: int, rng: random.Random
) -> list[Window]:
    """Draw windows that begin at least `span` characters apart, and tokenize only these.

    Returns:
        The windows; none if the text ends before one of them is full.
    """
    phase = rng.randrange(span)
    # The last two starts are left out: a window there might reach the end of the text before it is full.
    numbers = sorted(rng.sample(range((joined.size - phase) // span - 2 - count + 1), count))
    order = rng.sample(range(count), count)
    windows, free = [], 0
    for between, number in enumerate(numbers):
        # Move each start on by the number of windows before it. This leaves one unused span between any two windows.
        start = joined.word_at(max(phase + (number + between) * span, free))
        start = joined.after_space(start) if encoder.puts_space else start
        filled = _fill(joined, encoder, start, length - len(encoder.prefix), span)
        if filled is None:
            return []
        tokens, pieces, free = filled
        windows.append(Window(encoder.prefix + tokens, joined.document_at(start), tuple(text for text, _ in pieces)))
    return [windows[index] for index in order]


def _fill(
    joined: JoinedText, encoder: WindowEncoder, start: int, wanted: int, span: int
) -> tuple[list[int], list[tuple[str, bool]], int] | None:
    """Tokenize from `start` on until there are `wanted` tokens.

    Returns:
        The tokens, the pieces they come from, and the offset where the pieces end; `None` if the text ends first.
    """
    characters = float(span)
    while True:
        characters *= _MARGIN
        end = joined.word_at(start + ceil(characters))
        pieces = list(joined.pieces(start, end))
        tokens = encoder.tokens(pieces)
        if len(tokens) >= wanted:
            return tokens[:wanted], pieces, end
        if end == joined.size:
            return None


def _draw_of_all(
    joined: JoinedText, encoder: WindowEncoder, count: int, length: int, rng: random.Random
) -> SampledWindows:
    """Tokenize the whole text, cut it into consecutive windows, and draw `count` of them."""
    stream: list[int] = []
    firsts = []  # the index of each document's first token in the stream
    for tokens in encoder.encode(list(joined.documents)):
        firsts.append(len(stream))
        stream += tokens + encoder.ending + encoder.prefix
    if encoder.prefix and stream:
        del stream[-len(encoder.prefix) :]  # no document follows the last one
    # Tokens of a window without its prefix, the index of each window's first token, and the index of the next.
    own, cuts, at = length - len(encoder.prefix), [], 0
    while True:
        if encoder.prefix and stream[at : at + len(encoder.prefix)] == encoder.prefix:
            at += len(encoder.prefix)  # every window gets a prefix anyway
        if at + own > len(stream):
            break
        cuts.append(at)
        at += own
    windows = []
    for cut in rng.sample(cuts, count) if len(cuts) >= count else []:
        first, last = bisect_right(firsts, cut) - 1, bisect_right(firsts, cut + own - 1) - 1
        texts = tuple(joined.documents[first : last + 1])
        windows.append(Window(encoder.prefix + stream[cut : cut + own], first, texts))
    return SampledWindows(windows, len(cuts), len(stream))
