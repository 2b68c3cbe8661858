"""What the original samples text from: prompts of a file, or passages of a few tokens of the calibration text.

`healing/self_text.py` samples. Nothing here runs a model.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from optimum.streamline.errors import StreamlineError, first_line

from .files import read_entries
from .overlap import Sketch, sketch_of
from .sampling import WindowEncoder
from .sources import SELF, local_path
from .tokenizer_checks import check_tokenizer, check_vocabulary
from .windows import TooShortError, read_windows

PROMPT_TOKENS = 16
"""The tokens of calibration text that a sampled text begins with.

Enough to set its subject, so that texts differ as the calibration text does. Few enough that nearly all tokens are the
original's own, and that a prompt is shorter than the passages by which texts are compared (`overlap.RUN_BYTES`). On the
reference model, 4, 16 and 64 tokens heal alike: perplexity ratios 1.040, 1.034 and 1.036, each within 0.011.
"""
# The largest share of a window that a prompt of a file may take.
MAX_PROMPT_SHARE = 0.5


@dataclass(frozen=True)
class Prompts:
    """Prompts, and the size of the windows to sample from them.

    Args:
        spec: The SPEC of the healing text, `self` or `self:FILE[,COLUMN]`.
        source: The SPEC of the text that the prompts come from.
        ids: The token ids of each prompt, in the order of use.
        count: The number of windows to sample.
        length: The number of tokens in each window.
        chat: Whether the prompts went through the tokenizer's chat template.
        too_long: The number of prompts that were left out, because they take more than `MAX_PROMPT_SHARE` of a window.
        sketch: The sketch of the text that the prompts come from.
    """

    spec: str
    source: str
    ids: tuple[tuple[int, ...], ...] = field(repr=False)
    count: int
    length: int
    chat: bool = False
    too_long: int = 0
    sketch: Sketch = field(default=Sketch(), repr=False)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the token ids. Equal prompts in the same order have equal fingerprints."""
        return hashlib.sha256(json.dumps(self.ids).encode()).hexdigest()

    def describe(self) -> dict[str, Any]:
        """The fields about these prompts in a record."""
        return {
            "from": self.source,
            "prompts": len(self.ids),
            "chat_template": self.chat,
            "fingerprint": self.fingerprint,
        }

    def line(self, purpose: str) -> str:
        """The line about the text to sample that a command prints.

        Args:
            purpose: What the text is used for, such as `healing`.
        """
        tokens = f" of {len(self.ids[0])} tokens" if self.spec == SELF else ""
        start = f"from {len(self.ids):,} prompts{tokens} of {self.source}"
        if self.spec != SELF and not self.chat:
            start += ", continued as they are: the tokenizer has no chat template"
        left_out = f"; {self.too_long:,} prompts that fill over half a window left out" if self.too_long else ""
        sampled = f"{self.count} windows of {self.length} tokens that the original samples"
        return f"{purpose} text: {self.spec}, {sampled} {start}{left_out}"


def calibration_prompts(
    calibration: str,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    length: int,
    *,
    samples: int,
    seed: int,
    vocabulary: int,
) -> Prompts:
    """Draw prompts of `PROMPT_TOKENS` tokens at random positions of the calibration text, for the SPEC `self`.

    Args:
        calibration: The SPEC of the calibration text.
        tokenizer: The tokenizer. The tokens that it puts before every text come before every prompt too.
        count: The number of windows to sample, and of prompts, if the text has so many.
        length: The number of tokens in each window to sample.
        samples: A number of windows of `length` tokens that the calibration text is known to have.
        seed: The seed of the draw.
        vocabulary: The number of token ids that the model knows.

    Raises:
        StreamlineError: the text cannot be read, or the windows are too short for prompts.
    """
    prefix = len(WindowEncoder(tokenizer).prefix)
    prompt = prefix + PROMPT_TOKENS
    if prompt > length * MAX_PROMPT_SHARE:
        raise StreamlineError(
            f"length {length}: heal-data {SELF!r} begins each window with {prompt} tokens of calibration text, and "
            f"leaves the original to sample most of it; give at least {int(prompt / MAX_PROMPT_SHARE)}"
        )
    try:
        drawn = read_windows(calibration, tokenizer, count, prompt, seed, vocabulary, "calibration")
    except TooShortError:  # for so many prompts, but it has those that fit into its windows
        available = samples * ((length - prefix) // PROMPT_TOKENS)
        drawn = read_windows(calibration, tokenizer, available, prompt, seed, vocabulary, "calibration")
    ids = tuple(tuple(row) for row in drawn.ids.tolist())
    return Prompts(SELF, drawn.spec, ids, count, length, sketch=drawn.sketch)


def file_prompts(
    spec: str, tokenizer: PreTrainedTokenizerBase, count: int, length: int, *, seed: int, vocabulary: int
) -> Prompts:
    """Read the prompts of a file, for the SPEC `self:FILE[,COLUMN]`, and shuffle them.

    A prompt is a line of a plain text file, or a row of a table. With a chat template, it becomes a user's message,
    which the model is to answer. Without one, it becomes the beginning of a text.

    Args:
        spec: The SPEC.
        tokenizer: The tokenizer.
        count: The number of windows to sample. They use prompts again if there are too few.
        length: The number of tokens in each window to sample.
        seed: The seed of the order.
        vocabulary: The number of token ids that the model knows.

    Raises:
        StreamlineError: the file cannot be read or holds no prompt short enough, or the chat template refuses a prompt.
    """
    source = spec.removeprefix(f"{SELF}:")
    texts = _read(spec, source)
    encoded = _through_template(spec, tokenizer, texts) if tokenizer.chat_template else _beginnings(tokenizer, texts)
    tokens = [token for prompt in encoded for token in prompt]
    check_tokenizer(spec, tokenizer, texts, tokens)
    check_vocabulary(tokenizer, max(tokens, default=0), vocabulary)
    short = [tuple(prompt) for prompt in encoded if 0 < len(prompt) <= length * MAX_PROMPT_SHARE]
    if not short:
        shortest = min(map(len, encoded))
        raise StreamlineError(
            f"heal-data {spec!r}: its shortest prompt takes {shortest} tokens, more than half of a window; give "
            f"shorter prompts, or length {int(shortest / MAX_PROMPT_SHARE)}"
        )
    ids = tuple(random.Random(seed).sample(short, len(short)))
    left_out = len(encoded) - len(short)
    return Prompts(spec, source, ids, count, length, bool(tokenizer.chat_template), left_out, sketch_of(texts))


def _read(spec: str, source: str) -> list[str]:
    """The prompts in a file, without white space around them."""
    path, column = local_path(source)
    form = f"give {SELF}:FILE, with one prompt in a line, or {SELF}:TABLE[,COLUMN]"
    if not source.strip():
        raise StreamlineError(f"heal-data {spec!r}: names no file of prompts; {form}, or {SELF} alone")
    if not os.path.isfile(path):  # returns False for a name that is too long; Path.is_file raises
        raise StreamlineError(
            f"heal-data {spec!r}: {path} is {'a folder' if os.path.isdir(path) else 'no file'}; {form}"
        )
    texts = [text.strip() for text in read_entries(path, column)]
    if not texts:
        raise StreamlineError(f"heal-data {spec!r}: holds no prompt; {form}")
    return texts


def _through_template(spec: str, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """The token ids of a chat in which a user writes one of the texts, up to where the answer begins."""
    chats = [[{"role": "user", "content": text}] for text in texts]
    try:
        encoded: Any = tokenizer.apply_chat_template(chats, add_generation_prompt=True, return_dict=True)
    except Exception as error:  # a template may raise anything
        raise StreamlineError(
            f"heal-data {spec!r}: the tokenizer's chat template cannot take its prompts ({first_line(error)})"
        ) from None
    ids: list[list[int]] = encoded["input_ids"]
    return ids


def _beginnings(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """The token ids of the texts, each as the beginning of a text."""
    encoder = WindowEncoder(tokenizer)
    return [encoder.prefix + tokens for tokens in encoder.encode(texts)]
