"""Whether two texts share text, by what a bounded sketch of each keeps.

A text is compared as its characters without white space, so that neither a tokenizer nor line breaks decide. This file
knows neither windows nor what they are for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import StreamlineError

# Bytes of text that are compared as one; a power of two.
RUN = 128
# A sketch keeps at most so many of a text's runs, which is some 90 kB of a record.
KEPT = 8192
# Code and prose repeat themselves, licences and headings above all: shared text is more than this share of the runs.
SHARED = 0.05
# Bytes hashed at once, and those of a hash that are kept.
_CHUNK, _HASH = 1 << 20, (1 << 40) - 1

_Hashes = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Sketch:
    """A sample of a text's runs of `RUN` bytes: the same ones wherever the same text stands.

    Sampling by hash value, not by place: Manber, "Finding similar files in a large file system" (1994).

    Args:
        bits: Kept are the hashes that end in so many zero bits: one in 2^bits.
        runs: They.
    """

    bits: int
    runs: frozenset[int]

    def thinned(self, bits: int) -> frozenset[int]:
        """What a sketch of so many bits, at least its own, would have kept."""
        return frozenset(run for run in self.runs if run % (1 << bits) == 0)

    def share_in(self, other: Sketch) -> float:
        """Which share of this text, 0 to 1, stands in the other too."""
        bits = max(self.bits, other.bits)
        own = self.thinned(bits)
        return len(own & other.thinned(bits)) / len(own) if own else 0.0

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {"bits": self.bits, "runs": " ".join(f"{run:010x}" for run in sorted(self.runs))}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Sketch:
        """What `to_dict` wrote."""
        return cls(int(fields["bits"]), frozenset(int(run, 16) for run in fields["runs"].split()))


def sketch_of(documents: Iterable[str]) -> Sketch:
    """The sketch of documents, laid end to end."""
    bits, kept = 0, np.empty(0, np.uint64)
    for chunk in _chunks(documents):
        hashes = _run_hashes(chunk)
        kept = _distinct(np.concatenate([kept, hashes[hashes % np.uint64(1 << bits) == 0]]))
        while len(kept) > KEPT:
            bits += 1
            kept = kept[kept % np.uint64(1 << bits) == 0]
    return Sketch(bits, frozenset(kept.tolist()))


def check_disjoint(chosen: Sketch, chosen_spec: str, judged: Sketch, judged_spec: str) -> None:
    """Refuse to judge on text that the choices were made on.

    Args:
        chosen: Of all text that the choices could be made on.
        chosen_spec: Its SPEC, for the message; so is `judged_spec`.
        judged: Of all text that windows to judge on could be drawn from.

    Raises:
        StreamlineError: more than `SHARED` of the evaluation text stands in the other text too.
    """
    share = judged.share_in(chosen)
    if share > SHARED:
        raise StreamlineError(
            f"eval-data {judged_spec!r} shares {share:.0%} of its text with {chosen_spec!r}, "
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
