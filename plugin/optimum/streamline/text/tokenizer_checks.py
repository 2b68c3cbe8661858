"""Questions to a tokenizer before what it says is believed: is it one, is it this model's, is it the original's too?"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from transformers import PreTrainedTokenizerBase

from optimum.streamline.checkpoints.loading import load_tokenizer
from optimum.streamline.checkpoints.source import ModelSource
from optimum.streamline.checkpoints.tokenizer_files import has_tokenizer
from optimum.streamline.errors import StreamlineError

# Characters other than spaces that a token stands for, at most: the longest words and runs of signs are shorter.
CHARACTERS_A_TOKEN = 32
# Share of a text's tokens that may be the one for what is unknown.
UNKNOWN = 0.5


def check_tokenizer(spec: str, tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], tokens: Sequence[int]) -> None:
    """Refuse a tokenizer that makes nothing, or nothing known, of a text.

    Args:
        spec: The text's SPEC.
        texts: Pieces of it.
        tokens: What the tokenizer made of them.

    Raises:
        StreamlineError: there are far fewer tokens than text, or most of them are for what is unknown.
    """
    characters = sum(len("".join(text.split())) for text in texts)
    name = f"tokenizer {type(tokenizer).__name__} of {len(tokenizer)} tokens"
    if characters > CHARACTERS_A_TOKEN * len(tokens):
        raise StreamlineError(
            f"{name}: makes {len(tokens)} tokens of {characters} characters of {spec!r}; it cannot read this text, or "
            "its files are not there"
        )
    unknown = 0 if tokenizer.unk_token_id is None else list(tokens).count(tokenizer.unk_token_id)
    if unknown > UNKNOWN * len(tokens):
        raise StreamlineError(
            f"{name}: {unknown / len(tokens):.0%} of {spec!r} are unknown to it ({tokenizer.unk_token!r}); give text "
            "that it can read, or the model's own tokenizer"
        )


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, largest: int, vocabulary: int) -> None:
    """Refuse a token that the model has no embedding for.

    Args:
        largest: The largest token of a text.
        vocabulary: How many the model knows.

    Raises:
        StreamlineError: the token is none of the model's.
    """
    if largest >= vocabulary:
        token = tokenizer.convert_ids_to_tokens(largest)
        raise StreamlineError(
            f"tokenizer: token {largest} ({token!r}) is outside of the model's vocabulary of {vocabulary}; it is "
            "another model's tokenizer, or tokens were added to it and not to the model"
        )


def compare_tokenizers(
    original: ModelSource, candidates: Sequence[tuple[str, ModelSource]], texts: Sequence[str]
) -> list[str]:
    """Refuse candidates whose own tokenizers read a text otherwise than the original's.

    Args:
        candidates: Labels, and where they are.
        texts: The text that they are judged on; with none there is nothing to compare.

    Returns:
        What there is to say of candidates that have no tokenizer.

    Raises:
        StreamlineError: the first difference.
    """
    if not texts:
        return []
    said = []
    reads = load_tokenizer(original)
    for label, source in candidates:
        if not has_tokenizer(source.folder):
            said.append(f"{label}: holds no tokenizer; it is taken to use the original's")
            continue
        other = load_tokenizer(source)
        for text in texts:
            _check_same(label, reads, other, text)
    return said


def _check_same(label: str, reads: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase, text: str) -> None:
    ours, theirs = (each(text, truncation=False, verbose=False)["input_ids"] for each in (reads, other))
    if ours == theirs:
        return
    pairs = zip(ours, theirs, strict=False)
    at = next((at for at, (one, two) in enumerate(pairs) if one != two), min(len(ours), len(theirs)))
    one, two = (_token(tokenizer, tokens, at) for tokenizer, tokens in ((reads, ours), (other, theirs)))
    raise StreamlineError(
        f"{label}: its tokenizer reads the evaluation text otherwise than the original's: token {at} is {two}, the "
        f"original's is {one}; give it the original's tokenizer, or judge it against a model that has its own"
    )


def _token(tokenizer: PreTrainedTokenizerBase, tokens: list[int], at: int) -> str:
    return f"{tokens[at]} ({tokenizer.convert_ids_to_tokens(tokens[at])!r})" if at < len(tokens) else "not there"
