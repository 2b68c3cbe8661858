"""Small tokenizers, one of every kind that the architectures of the table have, in folders as those on the Hub are."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

Made = tuple[Tokenizer, dict[str, Any]]
TEXT = [
    "The quick brown fox jumps over the lazy dog, and the dog sleeps.",
    "def f(x):\n    return x + 12345\n\nit's what we'll see: 3.14 and 2024",
    "Grüße aus Köln; naïve café, and  more   spaces",
] * 3
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def special(*names: str, **flags: bool) -> list[AddedToken]:
    return [AddedToken(name, special=True, normalized=False, **flags) for name in names]


def byte_level(*names: str, digits: bool = False, words: bool = False, composed: bool = False) -> Tokenizer:
    """Byte-level BPE: digits one by one, words by Qwen's expression, characters composed first."""
    tokenizer = Tokenizer(models.BPE())
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not words)
    first: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    first += [pre_tokenizers.Split(Regex(WORDS), "isolated")] if words else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*first, last]) if first else last
    if composed:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=special(*names), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer


def pieces(*names: str, gemma: bool = False) -> Tokenizer:
    """BPE of pieces with a byte for what is in none, as what was SentencePiece."""
    prepend = [] if gemma else [normalizers.Prepend("▁")]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    single = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=[*names, *single], show_progress=False)
    tokenizer.train_from_iterator(TEXT, trainer)
    trained = json.loads(tokenizer.to_str())["model"]
    merges = [tuple(merge) for merge in trained["merges"]]
    tokenizer.model = models.BPE(trained["vocab"], merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    if gemma:
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    else:
        tokenizer.pre_tokenizer = None
    strip = [] if gemma else [decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    untrained = Tokenizer.from_str(tokenizer.to_str())
    untrained.add_special_tokens(special(*names))
    return untrained


def begun(tokenizer: Tokenizer, name: str) -> Tokenizer:
    """The tokenizer, which then puts that token first."""
    tokens = [(name, tokenizer.token_to_id(name))]
    tokenizer.post_processor = processors.TemplateProcessing(f"{name} $A", f"{name} $A {name} $B", tokens)
    return tokenizer


def llama(tokenizer_class: str = "LlamaTokenizer", bos: bool = True, **fields: Any) -> Made:
    tokenizer = pieces("<unk>", "<s>", "</s>")
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    flags = {"add_bos_token": bos, "add_eos_token": False, "legacy": False}
    return begun(tokenizer, "<s>") if bos else tokenizer, {
        "tokenizer_class": tokenizer_class,
        **names,
        **flags,
        **fields,
    }


def gemma() -> Made:
    tokenizer = pieces("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>", gemma=True)
    names = {f"{name}_token": f"<{name}>" for name in ("pad", "eos", "bos", "unk")}
    listed = {"additional_special_tokens": ["<start_of_turn>", "<end_of_turn>"]}
    return begun(tokenizer, "<bos>"), {"tokenizer_class": "GemmaTokenizer", "add_bos_token": True, **names, **listed}


def phi3() -> Made:
    tokenizer = pieces("<unk>", "<s>", "</s>")
    tokenizer.add_special_tokens([*special("<|endoftext|>"), *special("<|user|>", "<|end|>", rstrip=True)])
    names = {"bos_token": "<s>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "unk_token": "<unk>"}
    flags = {"add_bos_token": False, "add_eos_token": False, "legacy": False, "padding_side": "left"}
    return tokenizer, {"tokenizer_class": "LlamaTokenizer", **names, **flags}


def gpt2(tokenizer_class: str = "GPT2Tokenizer", *others: str, digits: bool = False, composed: bool = False) -> Made:
    tokenizer = byte_level("<|endoftext|>", *others, digits=digits, composed=composed)
    names: dict[str, Any] = {f"{name}_token": "<|endoftext|>" for name in ("bos", "eos", "unk")}
    if others:
        names["additional_special_tokens"] = list(others)
    return tokenizer, {"tokenizer_class": tokenizer_class, "add_prefix_space": False, **names}


def opt() -> Made:
    token = {"__type": "AddedToken", "content": "</s>", "lstrip": False, "normalized": True, "rstrip": False}
    names = {name: {**token, "single_word": False} for name in ("bos_token", "eos_token", "unk_token")}
    fields = {
        "tokenizer_class": "GPT2Tokenizer",
        "add_prefix_space": False,
        "add_bos_token": True,
        "pad_token": "<pad>",
    }
    return byte_level("<s>", "<pad>", "</s>", "<unk>"), {**fields, **names}


def qwen() -> Made:
    tokenizer = byte_level("<|endoftext|>", "<|im_start|>", "<|im_end|>", words=True, composed=True)
    names = {"bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "unk_token": None}
    template = "{% for message in messages %}<|im_start|>{{ message.content }}<|im_end|>{% endfor %}"
    listed = {"additional_special_tokens": ["<|im_start|>", "<|im_end|>"], "chat_template": template}
    return tokenizer, {"tokenizer_class": "Qwen2Tokenizer", "add_prefix_space": False, **names, **listed}


def plain(**fields: Any) -> Made:
    """A bare `PreTrainedTokenizerFast`."""
    tokenizer = begun(byte_level("<|bos|>", "<|eos|>", "<|tool|>", "<|image|>", words=True), "<|bos|>")
    names = {"bos_token": "<|bos|>", "eos_token": "<|eos|>", "model_input_names": ["input_ids", "attention_mask"]}
    listed = {"additional_special_tokens": ["<|tool|>"]}
    return tokenizer, {"tokenizer_class": "PreTrainedTokenizerFast", **names, **listed, **fields}


def backend() -> Made:
    """As transformers 5 saves the last."""
    tokenizer, fields = plain(tokenizer_class="TokenizersBackend", backend="tokenizers", is_local=True)
    return tokenizer, {**fields, "extra_special_tokens": fields.pop("additional_special_tokens")}


# By architecture, and what else there is of some; an architecture's name is the first word.
MAKERS: dict[str, Callable[[], Made]] = {
    "arcee": plain,
    "ernie4_5": llama,
    "exaone4": partial(gpt2, "GPT2Tokenizer", "[PAD]"),
    "gemma": gemma,
    "gemma2": gemma,
    "gemma3_text": gemma,
    "glm": plain,
    "glm4": plain,
    "gpt2": gpt2,
    "gpt2 in two files": gpt2,
    "gpt_neox": partial(gpt2, "GPTNeoXTokenizer", "<|padding|>", composed=True),
    "granite": partial(gpt2, "GPT2Tokenizer", "<fim>", digits=True),
    "helium": plain,
    "llama": llama,
    "llama without BOS": partial(llama, bos=False),
    "llama of a fast class": partial(llama, "LlamaTokenizerFast", pad_token="</s>"),
    "llama with a prefix": partial(llama, add_prefix_space=True),
    "llama of version 3": plain,
    "llama of transformers 5": backend,
    "llama with a token of its own": partial(plain, extra_special_tokens={"image_token": "<|image|>"}),
    "ministral3": plain,
    "mistral": llama,
    "mixtral": llama,
    "olmo2": partial(gpt2, "GPT2Tokenizer", "<|pad|>", digits=True, composed=True),
    "opt": opt,
    "opt in two files": opt,
    "phi3": phi3,
    "qwen2": qwen,
    "qwen3": qwen,
    "qwen3_moe": qwen,
    "seed_oss": plain,
    "smollm3": plain,
    "starcoder2": partial(gpt2, "GPT2Tokenizer", "<fim>", digits=True),
}
# What transformers 4 itself cannot read.
NOT_OLDER = ("llama with a prefix", "llama of transformers 5")


def write_tokenizer(name: str, folder: Path) -> Path:
    """Write the tokenizer of that name, and the little of a config that says whose it is."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer, fields = MAKERS[name]()
    if name.endswith("in two files"):
        tokenizer.model.save(str(folder))
    else:
        tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(fields))
    (folder / "config.json").write_text(json.dumps({"model_type": name.split()[0]}))
    return folder
