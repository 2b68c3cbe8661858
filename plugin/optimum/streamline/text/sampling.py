"""Windows of tokens drawn by a seed over all of a text that was read, each beginning as its tokenizer begins a text.

Of a text that is large for what is asked only what is drawn is tokenized, where `datasets` draws whole rows. This file
knows tokenizers and documents, neither SPECs nor models.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import ceil

from transformers import PreTrainedTokenizerBase

# A text of fewer windows than so many times those asked for is tokenized whole.
FEW = 4
# How far a word's end is looked for: scripts without spaces have none.
_LONGEST_WORD = 200
# Characters that are taken at first for those that a window will need, and by how much more each time they do not do.
_MARGIN = 1.5
# Places and characters of the sample that characters a token are counted on.
_PLACES, _PLACE = 16, 4096


class JoinedText:
    """Documents laid end to end; a place is a number of characters from the first's start."""

    def __init__(self, documents: Sequence[str]) -> None:
        self.documents = documents
        self._ends = list(accumulate(len(document) for document in documents))

    @property
    def size(self) -> int:
        """Characters."""
        return self._ends[-1] if self._ends else 0

    def document_at(self, place: int) -> int:
        """Which document a place is in."""
        return bisect_right(self._ends, place)

    def word_at(self, place: int) -> int:
        """The first place from here on where a document or the space before a word begins."""
        if place >= self.size:
            return self.size
        number = self.document_at(place)
        text, start = self.documents[number], self._ends[number] - len(self.documents[number])
        first = place - start
        if first == 0:
            return place
        for at in range(first, min(first + _LONGEST_WORD, len(text))):
            if text[at].isspace() and not text[at - 1].isspace():
                return start + at
        return self._ends[number] if first + _LONGEST_WORD >= len(text) else place

    def after_space(self, place: int) -> int:
        """The place after the one character of white space there, if there is one."""
        if place >= self.size:
            return place
        number = self.document_at(place)
        return place + self.documents[number][place - self._ends[number]].isspace()

    def pieces(self, start: int, end: int) -> Iterator[tuple[str, bool]]:
        """What stands from `start` to `end`, document by document, and whether the document ends there too."""
        number = self.document_at(start)
        while start < end:
            document, close = self.documents[number], self._ends[number]
            begin = close - len(document)
            yield document[start - begin : end - begin], close <= end
            start, number = close, number + 1

    def sample(self) -> list[tuple[str, bool]]:
        """Pieces from all over the book, the same ones each time."""
        starts = sorted({self.word_at(self.size * place // _PLACES) for place in range(_PLACES)})
        ends = [min(start + _PLACE, after) for start, after in zip(starts, [*starts[1:], self.size], strict=True)]
        return [piece for start, end in zip(starts, ends, strict=True) for piece in self.pieces(start, end)]


class WindowEncoder:
    """How a tokenizer writes a text: its tokens, and what it puts before and after.

    Args:
        tokenizer: The tokenizer.

    Attributes:
        prefix: The tokens it begins a text with, such as that of the beginning; often none.
        ending: Those that close a document: what it ends a text with, and its end token where it has one. Those of an
            empty line, where there is neither, nor a prefix.
        puts_space: Whether it puts a space before a text, as Llama's does: a window then begins after the text's own.
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
        """The tokens of texts, nothing before or after them."""
        if not texts:
            return []
        encoded: list[list[int]] = self._tokenizer(texts, add_special_tokens=False, truncation=False, verbose=False)[
            "input_ids"
        ]
        return encoded

    def tokens(self, pieces: Sequence[tuple[str, bool]]) -> list[int]:
        """The tokens of pieces of a book, what a document is closed and the next begun with between them."""
        tokens: list[int] = []
        for (_, closes), encoded in zip(pieces, self.encode([text for text, _ in pieces]), strict=True):
            tokens += encoded + (self.ending + self.prefix if closes else [])
        return tokens


@dataclass(frozen=True)
class Window:
    """One window.

    Args:
        tokens: Its tokens, what the tokenizer begins a text with first.
        document: Number of the document that its text begins in.
        texts: The text that it was made from: more than what is in it, if anything.
    """

    tokens: list[int]
    document: int
    texts: tuple[str, ...]


@dataclass(frozen=True)
class SampledWindows:
    """Windows in the order they were drawn in.

    Args:
        windows: Fewer than were asked for where the text is too short.
        possible: How many there was room for.
        tokens: How many the whole text has, where it was too short.
    """

    windows: list[Window]
    possible: int
    tokens: int = 0


def sample_windows(
    book: JoinedText, writer: WindowEncoder, count: int, length: int, a_token: float, seed: int
) -> SampledWindows:
    """Draw windows without replacement, no two of them with text in common.

    Args:
        count: How many.
        length: Tokens of each, those of the prefix among them.
        a_token: Characters a token, about.
    """
    stretch = ceil((length - len(writer.prefix)) * a_token)
    possible = book.size // stretch
    if possible >= FEW * count:
        windows = _draw_few(book, writer, count, length, stretch, random.Random(seed))
        if windows:
            return SampledWindows(windows, possible)
    return _draw_of_all(book, writer, count, length, random.Random(seed))


def _draw_few(
    book: JoinedText, writer: WindowEncoder, count: int, length: int, stretch: int, chance: random.Random
) -> list[Window]:
    """Windows at places a stretch or more apart; none where the text ends before the last of them is full."""
    phase = chance.randrange(stretch)
    # The last two are left out: a window that begins there might not be full before the text ends.
    numbers = sorted(chance.sample(range((book.size - phase) // stretch - 2 - count + 1), count))
    order = chance.sample(range(count), count)
    windows, free = [], 0
    for between, number in enumerate(numbers):
        # Each is moved on by those before it, which leaves one free between any two.
        start = book.word_at(max(phase + (number + between) * stretch, free))
        start = book.after_space(start) if writer.puts_space else start
        filled = _fill(book, writer, start, length - len(writer.prefix), stretch)
        if filled is None:
            return []
        tokens, pieces, free = filled
        windows.append(Window(writer.prefix + tokens, book.document_at(start), tuple(text for text, _ in pieces)))
    return [windows[place] for place in order]


def _fill(
    book: JoinedText, writer: WindowEncoder, start: int, wanted: int, stretch: int
) -> tuple[list[int], list[tuple[str, bool]], int] | None:
    """So many tokens from a place on, the text they are of and where it ends; nothing where there are not so many."""
    characters = float(stretch)
    while True:
        characters *= _MARGIN
        end = book.word_at(start + ceil(characters))
        pieces = list(book.pieces(start, end))
        tokens = writer.tokens(pieces)
        if len(tokens) >= wanted:
            return tokens[:wanted], pieces, end
        if end == book.size:
            return None


def _draw_of_all(
    book: JoinedText, writer: WindowEncoder, count: int, length: int, chance: random.Random
) -> SampledWindows:
    """The whole text cut into windows, end to end, and so many of them drawn."""
    stream: list[int] = []
    firsts = []  # of each document, its first token's place
    for tokens in writer.encode(list(book.documents)):
        firsts.append(len(stream))
        stream += tokens + writer.ending + writer.prefix
    if writer.prefix and stream:
        del stream[-len(writer.prefix) :]  # nothing follows the last
    own, cuts, at = length - len(writer.prefix), [], 0
    while True:
        if writer.prefix and stream[at : at + len(writer.prefix)] == writer.prefix:
            at += len(writer.prefix)  # it is given to every window anyway
        if at + own > len(stream):
            break
        cuts.append(at)
        at += own
    windows = []
    for cut in chance.sample(cuts, count) if len(cuts) >= count else []:
        first, last = bisect_right(firsts, cut) - 1, bisect_right(firsts, cut + own - 1) - 1
        texts = tuple(book.documents[first : last + 1])
        windows.append(Window(writer.prefix + stream[cut : cut + own], first, texts))
    return SampledWindows(windows, len(cuts), len(stream))
