"""Tokenizer files that give the same token ids in transformers 4 and in transformers 5.

Tools that stay on transformers 4 know neither the class `TokenizersBackend` nor a list of `extra_special_tokens`, and
some of its classes make the post-processor anew, from two fields that transformers 5 leaves out.
"""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase, TokenizersBackend

# What reads `tokenizer.json` as it is, in either version.
_PLAIN = "PreTrainedTokenizerFast"
# The classes of transformers 5 that transformers 4 has, too, and that were seen to give the same ids there.
_KEPT = ("GPT2Tokenizer", "GPTNeoXTokenizer", "GemmaTokenizer", "LlamaTokenizer", "Qwen2Tokenizer")
# How this copy was read, and by what: nothing of the tokenizer.
_PRIVATE = ("backend", "is_local", "local_files_only")


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a tokenizer into `folder`, for readers of transformers 4 and 5.

    One of a class that only transformers 5 has is written as a `PreTrainedTokenizerFast`, and so is one that adds
    something else than its class does in transformers 4. One that is not of the `tokenizers` library keeps its class.
    """
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    fields = json.loads(file.read_text(encoding="utf-8"))
    fields = _renamed({key: value for key, value in fields.items() if key not in _PRIVATE})
    if isinstance(tokenizer, TokenizersBackend) and "auto_map" not in fields:
        fields |= _class_fields(tokenizer, fields)
    file.write_text(json.dumps(fields, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _renamed(fields: dict[str, Any]) -> dict[str, Any]:
    """With special tokens under their older names; the name of the list was that of a model's own tokens."""
    older = {
        "additional_special_tokens": fields.pop("extra_special_tokens", None),
        "extra_special_tokens": fields.pop("model_specific_special_tokens", None),
    }
    return fields | {key: value for key, value in older.items() if value}


def _class_fields(tokenizer: TokenizersBackend, fields: dict[str, Any]) -> dict[str, Any]:
    """The class that both versions read, and what the versions, or it and the tokenizer's own, take differently."""
    chosen = {key: getattr(tokenizer, key) for key in ("model_input_names", "padding_side", "truncation_side")}
    added = _added_tokens(tokenizer)
    # With `add_prefix_space` transformers 4 makes a LlamaTokenizer anew, from a file that there may not be.
    prefixed = fields["tokenizer_class"] == "LlamaTokenizer" and fields.get("add_prefix_space") is not None
    if fields["tokenizer_class"] not in _KEPT or prefixed or added is None:
        return chosen | {"tokenizer_class": _PLAIN}
    return chosen | added


def _added_tokens(tokenizer: TokenizersBackend) -> dict[str, bool] | None:
    """Whether the tokenizer begins a text with BOS and ends it with EOS; `None` if it adds anything else."""
    bare, whole = (tokenizer("a", add_special_tokens=added)["input_ids"] for added in (False, True))
    for bos, eos in product((False, True), repeat=2):
        if whole == [tokenizer.bos_token_id] * bos + bare + [tokenizer.eos_token_id] * eos:
            return {"add_bos_token": bos, "add_eos_token": eos}
    return None
