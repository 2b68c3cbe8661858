"""Find out whether two texts share passages or lines, from a small sketch of each.

Texts are compared as bytes without white space, so the tokenizer and line breaks do not matter. Whole lines are also
compared, so the order of short rows does not matter either. The sketch of a calibration text is kept in the record, so
that a later evaluation can be checked without that text. The MinHash of datasketch would not do: it estimates the share
of both texts together, which is close to zero when a short text was copied from a long one.
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

# Length in bytes of the passages ("runs") that are compared; a power of two.
RUN_BYTES = 128
# Lines with fewer bytes, without white space, are ignored: headings, brackets, "Thank you!" occur in every text.
MIN_LINE_BYTES = 20
# The maximum number of hashes in a sample. For a text of 16 million characters, this keeps at least one run in 512, so
# that 4,000 copied characters contain six or more sampled runs. A hash takes about 3 bytes in a record.
MAX_HASHES = 1 << 16
# The largest shared part of the runs, and of the lines, that is no overlap. Independent texts share some, mostly
# licences and headings: up to a tenth of the lines of one part of Python's library also occur in another.
MAX_SHARED_RUNS, MAX_SHARED_LINES = 0.05, 0.25
# The number of bytes that are hashed at once, and the mask of the hash bits that are kept.
_CHUNK_BYTES, _HASH_MASK = 1 << 20, (1 << 40) - 1

_Hashes = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Sample:
    """A sample of the hashes of a text. Texts with a passage in common have its hashes in common.

    Hashes are sampled by value and not by position: Manber, "Finding similar files in a large file system" (1994).

    Args:
        bits: The sample holds every hash that ends in this many zero bits, which is one in 2^bits.
        hashes: The hashes.
    """

    bits: int = 0
    hashes: frozenset[int] = frozenset()

    def thinned(self, bits: int) -> frozenset[int]:
        """The hashes that a sparser sample of the same text would hold.

        Args:
            bits: The `bits` of that sample, at least as many as this one's.
        """
        return frozenset(each for each in self.hashes if each % (1 << bits) == 0)

    def share_in(self, other: Sample) -> float:
        """Estimate which share of this text also occurs in another.

        Args:
            other: A sample of the other text.

        Returns:
            The share, from 0 to 1; 0 if this sample is empty.
        """
        bits = max(self.bits, other.bits)
        own = self.thinned(bits)
        return len(own & other.thinned(bits)) / len(own) if own else 0.0

    def to_dict(self) -> dict[str, Any]:
        """The JSON form: the differences of the sorted hashes, byte plane by byte plane, compressed with zlib."""
        differences = np.diff(np.array(sorted(self.hashes), "<u8"), prepend=np.zeros(1, "<u8"))
        planes = differences.view(np.uint8).reshape(-1, 8).T.tobytes()
        return {"bits": self.bits, "hashes": base64.b64encode(zlib.compress(planes)).decode()}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Sample:
        """Read the form that `to_dict` writes."""
        planes = np.frombuffer(zlib.decompress(base64.b64decode(fields["hashes"])), np.uint8)
        differences = np.ascontiguousarray(planes.reshape(8, -1).T).view("<u8").ravel()
        return cls(int(fields["bits"]), frozenset(differences.cumsum().tolist()))


@dataclass(frozen=True)
class Sketch:
    """What is kept of a text to recognize it.

    Args:
        runs: A sample of all passages of `RUN_BYTES` bytes. One begins at every byte; they cross line and document
            ends.
        lines: A sample of all lines of at least `MIN_LINE_BYTES` bytes.
    """

    runs: Sample = Sample()
    lines: Sample = Sample()

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return {"runs": self.runs.to_dict(), "lines": self.lines.to_dict()}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Sketch:
        """Read the form that `to_dict` writes."""
        return cls(Sample.from_dict(fields["runs"]), Sample.from_dict(fields["lines"]))


def sketch_of(documents: Sequence[str]) -> Sketch:
    """Make the sketch of several documents, laid end to end.

    For a large text this takes seconds, so the last few sketches are cached.
    """
    digest = hashlib.blake2b()
    for document in documents:
        digest.update(document.encode("utf-8", "surrogatepass") + b"\0")
    key = digest.digest()
    if key not in _sketches:
        if len(_sketches) == _MAX_CACHED_SKETCHES:
            del _sketches[next(iter(_sketches))]  # the oldest
        _sketches[key] = Sketch(_sample(map(_run_hashes, _chunks(documents))), _sample(_line_hashes(documents)))
    return _sketches[key]


# Not `lru_cache`, which would keep whole texts as its keys.
_sketches: dict[bytes, Sketch] = {}
_MAX_CACHED_SKETCHES = 8


def _sample(batches: Iterable[_Hashes]) -> Sample:
    """Sample hashes, and double the sampling distance whenever there are too many."""
    bits, kept = 0, np.empty(0, np.uint64)
    for hashes in batches:
        kept = _distinct(np.concatenate([kept, hashes[hashes % np.uint64(1 << bits) == 0]]))
        while len(kept) > MAX_HASHES:
            bits += 1
            kept = kept[kept % np.uint64(1 << bits) == 0]
    return Sample(bits, frozenset(kept.tolist()))


def check_disjoint(chosen: Sketch, chosen_spec: str, judged: Sketch, judged_spec: str) -> None:
    """Refuse an evaluation text that overlaps with text that the model was made with.

    Args:
        chosen: Sketch of the calibration or healing text, all that was read of it.
        chosen_spec: Its SPEC, for the message.
        judged: Sketch of the evaluation text, all that was read of it.
        judged_spec: Its SPEC, for the message.

    Raises:
        StreamlineError: the texts share more than `MAX_SHARED_RUNS` of the evaluation text, or more than
            `MAX_SHARED_LINES` of its lines.
    """
    text, lines = judged.runs.share_in(chosen.runs), judged.lines.share_in(chosen.lines)
    if text > MAX_SHARED_RUNS or lines > MAX_SHARED_LINES:
        shared = f"{text:.0%} of its text" if text > MAX_SHARED_RUNS else f"{lines:.0%} of its lines"
        raise StreamlineError(
            f"eval-data {judged_spec!r} shares {shared} with {chosen_spec!r}, "
            "which is used to make the model; give other text"
        )


def _chunks(documents: Iterable[str]) -> Iterator[bytes]:
    """The text without white space, in chunks that overlap by one byte less than a run."""
    pending = b""
    for document in documents:
        pending += "".join(document.split()).encode(errors="surrogatepass")
        while len(pending) >= _CHUNK_BYTES:
            yield pending[:_CHUNK_BYTES]
            pending = pending[_CHUNK_BYTES - RUN_BYTES + 1 :]
    if len(pending) >= RUN_BYTES:
        yield pending


def _line_hashes(documents: Iterable[str]) -> Iterator[_Hashes]:
    """Hashes of the documents' lines without white space, in batches. Short lines are left out."""
    squeezed = (
        "".join(line.split()).encode(errors="surrogatepass") for text in documents for line in text.splitlines()
    )
    digests = (hashlib.blake2b(line, digest_size=5).digest() for line in squeezed if len(line) >= MIN_LINE_BYTES)
    hashes = (int.from_bytes(digest, "little") for digest in digests)
    while batch := list(islice(hashes, MAX_HASHES)):
        yield np.array(batch, np.uint64)


def _distinct(hashes: _Hashes) -> _Hashes:
    """Sorted hashes without duplicates."""
    hashes.sort()
    return hashes[np.concatenate([[True], hashes[1:] != hashes[:-1]])] if len(hashes) else hashes


def _run_hashes(text: bytes) -> _Hashes:
    """Hashes of all runs in a chunk, `[bytes - RUN_BYTES + 1]`.

    The hash of 2n bytes combines the hashes of its two halves, from single bytes up to a whole run.
    """
    numbers = np.random.default_rng(0).integers(1, 2**63, 256 + RUN_BYTES.bit_length(), dtype=np.uint64)
    hashes: _Hashes = numbers[np.frombuffer(text, np.uint8)]
    half = 1
    for factor in numbers[256 : 255 + RUN_BYTES.bit_length()]:
        hashes = hashes[:-half] * (factor | np.uint64(1)) + hashes[half:]
        half *= 2
    hashes ^= hashes >> np.uint64(32)
    return hashes & np.uint64(_HASH_MASK)
