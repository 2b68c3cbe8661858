"""Whether two texts share text, by what a bounded sketch of each keeps.

A text is compared as its characters without white space, so that neither a tokenizer nor line breaks decide; and by
whole lines too, so that the order of short ones does not. The MinHash of datasketch estimates the share of both texts
together, which is next to nothing where a short text was copied from a long one. This file knows neither windows nor
what they are for.
"""

from __future__ import annotations

import base64
import hashlib
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

from optimum.streamline.errors import StreamlineError

# Bytes of text that are compared as one; a power of two.
RUN = 128
# Lines of fewer bytes without white space say too little: headings, brackets, "Thank you!".
LINE = 20
# A sketch keeps at most so many of a text's runs, and so many of its lines. Of 16 million characters that is one run
# in 512 or more, of which 4,000 copied characters hold six or more. Each takes about 3 bytes of a record.
KEPT = 1 << 16
# Code and prose repeat themselves, licences and headings above all: shared text is more than this share of the runs,
# or of the lines. Up to a tenth of the lines of one part of Python's library stand in another.
SHARED, SHARED_LINES = 0.05, 0.25
# Bytes hashed at once, and those of a hash that are kept.
_CHUNK, _HASH = 1 << 20, (1 << 40) - 1

_Hashes = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Sample:
    """A sample of hashes: the same ones wherever the same text stands.

    Sampling by hash value, not by place: Manber, "Finding similar files in a large file system" (1994).

    Args:
        bits: Kept are the hashes that end in so many zero bits: one in 2^bits.
        hashes: They.
    """

    bits: int = 0
    hashes: frozenset[int] = frozenset()

    def thinned(self, bits: int) -> frozenset[int]:
        """What a sample of so many bits, at least its own, would have kept."""
        return frozenset(each for each in self.hashes if each % (1 << bits) == 0)

    def share_in(self, other: Sample) -> float:
        """Which share of what this is a sample of, 0 to 1, stands in the other too."""
        bits = max(self.bits, other.bits)
        own = self.thinned(bits)
        return len(own & other.thinned(bits)) / len(own) if own else 0.0

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it: of the sorted hashes' differences the lowest bytes, the next ones and so on, compressed."""
        differences = np.diff(np.array(sorted(self.hashes), "<u8"), prepend=np.zeros(1, "<u8"))
        planes = differences.view(np.uint8).reshape(-1, 8).T.tobytes()
        return {"bits": self.bits, "hashes": base64.b64encode(zlib.compress(planes)).decode()}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Sample:
        """What `to_dict` wrote."""
        planes = np.frombuffer(zlib.decompress(base64.b64decode(fields["hashes"])), np.uint8)
        differences = np.ascontiguousarray(planes.reshape(8, -1).T).view("<u8").ravel()
        return cls(int(fields["bits"]), frozenset(differences.cumsum().tolist()))


@dataclass(frozen=True)
class Sketch:
    """What a text is known again by.

    Args:
        runs: Of its runs of `RUN` bytes, which begin at every byte and go on over the ends of lines and documents.
        lines: Of its lines of at least `LINE` bytes.
    """

    runs: Sample = Sample()
    lines: Sample = Sample()

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {"runs": self.runs.to_dict(), "lines": self.lines.to_dict()}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Sketch:
        """What `to_dict` wrote."""
        return cls(Sample.from_dict(fields["runs"]), Sample.from_dict(fields["lines"]))


def sketch_of(documents: Sequence[str]) -> Sketch:
    """The sketch of documents, laid end to end; made once of the same ones, for that of a large text takes seconds."""
    digest = hashlib.blake2b()
    for document in documents:
        digest.update(document.encode("utf-8", "surrogatepass") + b"\0")
    known = digest.digest()
    if known not in _made:
        if len(_made) == _KEPT_SKETCHES:
            del _made[next(iter(_made))]  # the oldest
        _made[known] = Sketch(_sample(map(_run_hashes, _chunks(documents))), _sample(_line_hashes(documents)))
    return _made[known]


# Not `lru_cache`, which would keep whole texts as its keys.
_made: dict[bytes, Sketch] = {}
_KEPT_SKETCHES = 8


def _sample(batches: Iterable[_Hashes]) -> Sample:
    bits, kept = 0, np.empty(0, np.uint64)
    for hashes in batches:
        kept = _distinct(np.concatenate([kept, hashes[hashes % np.uint64(1 << bits) == 0]]))
        while len(kept) > KEPT:
            bits += 1
            kept = kept[kept % np.uint64(1 << bits) == 0]
    return Sample(bits, frozenset(kept.tolist()))


def check_disjoint(chosen: Sketch, chosen_spec: str, judged: Sketch, judged_spec: str) -> None:
    """Refuse to judge on text that the choices were made on.

    Args:
        chosen: Of all text that the choices could be made on.
        chosen_spec: Its SPEC, for the message; so is `judged_spec`.
        judged: Of all text that windows to judge on could be drawn from.

    Raises:
        StreamlineError: more than `SHARED` of the evaluation text stands in the other text too, or more than
            `SHARED_LINES` of its lines.
    """
    text, lines = judged.runs.share_in(chosen.runs), judged.lines.share_in(chosen.lines)
    if text > SHARED or lines > SHARED_LINES:
        shared = f"{text:.0%} of its text" if text > SHARED else f"{lines:.0%} of its lines"
        raise StreamlineError(
            f"eval-data {judged_spec!r} shares {shared} with {chosen_spec!r}, "
            "which the choices are made on; give other text"
        )


def _chunks(documents: Iterable[str]) -> Iterator[bytes]:
    """The text without white space, in pieces that overlap by what one run less a byte takes."""
    waiting = b""
    for document in documents:
        waiting += "".join(document.split()).encode(errors="surrogatepass")
        while len(waiting) >= _CHUNK:
            yield waiting[:_CHUNK]
            waiting = waiting[_CHUNK - RUN + 1 :]
    if len(waiting) >= RUN:
        yield waiting


def _line_hashes(documents: Iterable[str]) -> Iterator[_Hashes]:
    """Hashes of the documents' lines without white space, short ones left out, so many at once as a sketch keeps."""
    squeezed = (
        "".join(line.split()).encode(errors="surrogatepass") for text in documents for line in text.splitlines()
    )
    digests = (hashlib.blake2b(line, digest_size=5).digest() for line in squeezed if len(line) >= LINE)
    hashes = (int.from_bytes(digest, "little") for digest in digests)
    while batch := list(islice(hashes, KEPT)):
        yield np.array(batch, np.uint64)


def _distinct(hashes: _Hashes) -> _Hashes:
    hashes.sort()
    return hashes[np.concatenate([[True], hashes[1:] != hashes[:-1]])] if len(hashes) else hashes


def _run_hashes(text: bytes) -> _Hashes:
    """Hashes of all runs, `[bytes - RUN + 1]`, each of two halves' hashes down to single bytes."""
    numbers = np.random.default_rng(0).integers(1, 2**63, 256 + RUN.bit_length(), dtype=np.uint64)
    hashes: _Hashes = numbers[np.frombuffer(text, np.uint8)]
    half = 1
    for factor in numbers[256 : 255 + RUN.bit_length()]:
        hashes = hashes[:-half] * (factor | np.uint64(1)) + hashes[half:]
        half *= 2
    hashes ^= hashes >> np.uint64(32)
    return hashes & np.uint64(_HASH)
