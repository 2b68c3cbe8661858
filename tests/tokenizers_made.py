"""Small tokenizers with the faults and habits of larger ones."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from reference import REFERENCE


def with_beginning(token: str, end: str = "</s>") -> PreTrainedTokenizerFast:
    """The reference model's, but that it begins every text with a token, and that its end token is another."""
    tokenizer = Tokenizer.from_file(f"{REFERENCE}/tokenizer.json")
    # In the place of two rare tokens: the vocabulary stays as large as the model's.
    fields = json.loads(tokenizer.to_str())
    vocabulary = fields["model"]["vocab"]
    rare = sorted(vocabulary, key=vocabulary.__getitem__)[-2:]
    fields["model"]["merges"] = [pair for pair in fields["model"]["merges"] if "".join(pair) not in rare]
    for old, new in zip(rare, (token, end), strict=True):
        number = vocabulary.pop(old)
        vocabulary[new] = number
        fields["added_tokens"].append({**fields["added_tokens"][0], "id": number, "content": new})
    made = Tokenizer.from_str(json.dumps(fields))
    made.post_processor = TemplateProcessing(single=f"{token} $A", special_tokens=[(token, vocabulary[token])])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token=token, eos_token=end)


def rolled(folder: Path) -> None:
    """Write the reference model's tokenizer with every number moved on by one."""
    fields = json.loads((Path(REFERENCE) / "tokenizer.json").read_text())
    vocabulary = fields["model"]["vocab"]
    specials = {each["content"] for each in fields["added_tokens"]}
    plain = sorted((word for word in vocabulary if word not in specials), key=vocabulary.__getitem__)
    numbers = [vocabulary[word] for word in plain]
    vocabulary.update(dict(zip(plain, numbers[1:] + numbers[:1], strict=True)))
    AutoTokenizer.from_pretrained(REFERENCE).save_pretrained(folder)
    (folder / "tokenizer.json").write_text(json.dumps(fields))


def begins_with(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What a tokenizer puts before an empty text."""
    ids: list[int] = tokenizer("")["input_ids"]
    return ids
