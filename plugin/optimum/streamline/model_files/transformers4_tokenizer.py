"""Save a tokenizer so that transformers 4 and transformers 5 read the same token ids from it.

transformers 4 does not know the class `TokenizersBackend`, nor a list in `extra_special_tokens`. Some of its tokenizer
classes also rebuild the post-processor from two fields that transformers 5 does not write.
"""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase, TokenizersBackend

# The class that reads `tokenizer.json` unchanged in both versions.
_GENERIC_CLASS = "PreTrainedTokenizerFast"
# Classes of transformers 5 that also exist in transformers 4, and were tested to give the same ids there.
_SHARED_CLASSES = ("GPT2Tokenizer", "GPTNeoXTokenizer", "GemmaTokenizer", "LlamaTokenizer", "Qwen2Tokenizer")
# Fields about how the tokenizer was loaded, which do not belong in a saved one.
_LOADING_FIELDS = ("backend", "is_local", "local_files_only")


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a tokenizer into `folder`, for transformers 4 and 5.

    A tokenizer is written as a `PreTrainedTokenizerFast` if its class exists only in transformers 5, or if it adds
    other special tokens than its class does in transformers 4. A tokenizer without a `tokenizers` backend keeps its
    class.

    Args:
        tokenizer: The tokenizer.
        folder: The checkpoint's folder.
    """
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    fields = json.loads(file.read_text(encoding="utf-8"))
    fields = _renamed({key: value for key, value in fields.items() if key not in _LOADING_FIELDS})
    if isinstance(tokenizer, TokenizersBackend) and "auto_map" not in fields:
        fields |= _class_fields(tokenizer, fields)
    file.write_text(json.dumps(fields, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _renamed(fields: dict[str, Any]) -> dict[str, Any]:
    """Rename the special token fields as in transformers 4.

    In transformers 4, `extra_special_tokens` held the model-specific tokens, not the list.
    """
    older = {
        "additional_special_tokens": fields.pop("extra_special_tokens", None),
        "extra_special_tokens": fields.pop("model_specific_special_tokens", None),
    }
    return fields | {key: value for key, value in older.items() if value}


def _class_fields(tokenizer: TokenizersBackend, fields: dict[str, Any]) -> dict[str, Any]:
    """The class that both versions read, and the fields whose defaults differ between versions or classes."""
    chosen = {key: getattr(tokenizer, key) for key in ("model_input_names", "padding_side", "truncation_side")}
    added = _added_tokens(tokenizer)
    # With `add_prefix_space`, transformers 4 rebuilds a LlamaTokenizer from a SentencePiece file, which may be missing.
    prefixed = fields["tokenizer_class"] == "LlamaTokenizer" and fields.get("add_prefix_space") is not None
    if fields["tokenizer_class"] not in _SHARED_CLASSES or prefixed or added is None:
        return chosen | {"tokenizer_class": _GENERIC_CLASS}
    return chosen | added


def _added_tokens(tokenizer: TokenizersBackend) -> dict[str, bool] | None:
    """Whether the tokenizer adds BOS before a text and EOS after it; `None` if it adds anything else."""
    bare, whole = (tokenizer("a", add_special_tokens=added)["input_ids"] for added in (False, True))
    for bos, eos in product((False, True), repeat=2):
        if whole == [tokenizer.bos_token_id] * bos + bare + [tokenizer.eos_token_id] * eos:
            return {"add_bos_token": bos, "add_eos_token": eos}
    return None
