"""Check that a tokenizer can read a text, fits the model, and gives the same tokens as the original's."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from transformers import PreTrainedTokenizerBase

from optimum.streamline.checkpoints.loading import load_tokenizer
from optimum.streamline.errors import StreamlineError
from optimum.streamline.model_files.source import ModelSource
from optimum.streamline.model_files.tokenizer_files import has_tokenizer

# The largest plausible average of characters per token, without white space. Real tokenizers stay far below it.
MAX_CHARACTERS_PER_TOKEN = 32
# The largest allowed share of unknown tokens in a text.
MAX_UNKNOWN_SHARE = 0.5


def check_tokenizer(spec: str, tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], tokens: Sequence[int]) -> None:
    """Refuse a tokenizer that gives almost no tokens for a text, or mostly unknown ones.

    Args:
        spec: The text's SPEC, for the message.
        tokenizer: The tokenizer.
        texts: Pieces of the text.
        tokens: The tokenizer's token ids for all pieces together.

    Raises:
        StreamlineError: there are more than `MAX_CHARACTERS_PER_TOKEN` characters per token, or the share of unknown
            tokens is above `MAX_UNKNOWN_SHARE`.
    """
    characters = sum(len("".join(text.split())) for text in texts)
    name = f"tokenizer {type(tokenizer).__name__} of {len(tokenizer)} tokens"
    if characters > MAX_CHARACTERS_PER_TOKEN * len(tokens):
        raise StreamlineError(
            f"{name}: makes {len(tokens)} tokens of {characters} characters of {spec!r}; it cannot read this text, or "
            "its files are missing"
        )
    unknown = 0 if tokenizer.unk_token_id is None else list(tokens).count(tokenizer.unk_token_id)
    if unknown > MAX_UNKNOWN_SHARE * len(tokens):
        raise StreamlineError(
            f"{name}: {unknown / len(tokens):.0%} of {spec!r} are unknown to it ({tokenizer.unk_token!r}); give text "
            "that it can read, or the model's own tokenizer"
        )


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, largest: int, vocabulary: int) -> None:
    """Refuse a token id for which the model has no embedding.

    Args:
        tokenizer: The tokenizer that gave the id.
        largest: The largest token id in a text.
        vocabulary: The number of rows in the model's embedding.

    Raises:
        StreamlineError: `largest` is not below `vocabulary`.
    """
    if largest >= vocabulary:
        token = tokenizer.convert_ids_to_tokens(largest)
        raise StreamlineError(
            f"tokenizer: it gives token {largest} ({token!r}), but the model has embeddings for {vocabulary} tokens "
            "only; use the tokenizer of this model, or resize the model's embeddings"
        )


def compare_tokenizers(
    original: ModelSource, candidates: Sequence[tuple[str, ModelSource]], texts: Sequence[str]
) -> list[str]:
    """Refuse candidates whose tokenizers give other tokens for a text than the original's.

    Args:
        original: The original model.
        candidates: Labels and sources of the candidates.
        texts: The evaluation text, in pieces. If empty, nothing is compared.

    Returns:
        One line for each candidate without a tokenizer.

    Raises:
        StreamlineError: a tokenizer differs. The message names the first different token.
    """
    if not texts:
        return []
    notes = []
    original_tokenizer = load_tokenizer(original)
    for label, source in candidates:
        if not has_tokenizer(source.folder):
            notes.append(f"{label}: has no tokenizer; the original's is used")
            continue
        other = load_tokenizer(source)
        for text in texts:
            _check_same(label, original_tokenizer, other, text)
    return notes


def _check_same(label: str, original: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase, text: str) -> None:
    """Refuse a candidate's tokenizer that differs from the original's on one piece of text."""
    ours, theirs = (each(text, truncation=False, verbose=False)["input_ids"] for each in (original, other))
    if ours == theirs:
        return
    pairs = zip(ours, theirs, strict=False)
    at = next((at for at, (one, two) in enumerate(pairs) if one != two), min(len(ours), len(theirs)))
    one, two = (_token(tokenizer, tokens, at) for tokenizer, tokens in ((original, ours), (other, theirs)))
    raise StreamlineError(
        f"{label}: its tokenizer gives other tokens for the evaluation text than the original's: token {at} is {two}, "
        f"the original's is {one}; give it the original's tokenizer, or compare it with a model that shares its own"
    )


def _token(tokenizer: PreTrainedTokenizerBase, tokens: list[int], at: int) -> str:
    """A token at an index, as id and string, for a message."""
    return f"{tokens[at]} ({tokenizer.convert_ids_to_tokens(tokens[at])!r})" if at < len(tokens) else "missing"
