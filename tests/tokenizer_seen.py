"""What a reader sees of a tokenizer. Run as a script by the interpreter of another version of transformers.

It takes folders; `--save` saves each tokenizer over itself instead. Imports nothing of this project.
"""

from __future__ import annotations

import json
import sys
from typing import Any

# A reader of any version has to get the same ids for them.
SENTENCES = [
    "The quick brown fox jumps",
    "  leading and  double   spaces ",
    "line\n\n  def f(x):\n\treturn 12345\r\n",
    "Grüße naïve café 日本語 😀 e\u0301",
    "<s>a</s> <|endoftext|>b<|im_start|>user <|user|> x<|end|> y<bos>z <start_of_turn> q<|tool|> w<fim> 1<|bos|>",
    "it's 3.14, we'll .",
    "",
    "a",
]


def seen(folder: str) -> dict[str, Any]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    names = ("bos_token", "eos_token", "pad_token", "unk_token", "image_token")
    template, messages = tokenizer.chat_template, [{"role": "user", "content": "hi"}]
    return {
        "ids": [tokenizer(text)["input_ids"] for text in SENTENCES],
        "ids alone": [tokenizer(text, add_special_tokens=False)["input_ids"] for text in SENTENCES],
        "ids of two": tokenizer("a", "b")["input_ids"],
        "inputs": sorted(tokenizer("a")),
        "special": sorted(tokenizer.all_special_tokens),
        "named": [getattr(tokenizer, name, None) for name in names],
        "sides": [tokenizer.padding_side, tokenizer.truncation_side],
        "size": [len(tokenizer), tokenizer.model_max_length],
        "chat": template and tokenizer.apply_chat_template(messages, tokenize=False),
    }


def save(folder: str) -> None:
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(folder).save_pretrained(folder)


if __name__ == "__main__":
    if sys.argv[1] == "--save":
        for each in sys.argv[2:]:
            save(each)
    else:
        json.dump({each: seen(each) for each in sys.argv[1:]}, sys.stdout)
