"""Text that the original samples, to heal on: windows of tokens, drawn at temperature 1 from all of its distribution.

A pruned model that heals on other text also learns that text. On the original's own it only learns to be the original
again, as LLM-QAT trains quantized models (arXiv 2305.17888). `text/prompts.py` reads what the text begins with.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria

from optimum.streamline.errors import StreamlineError
from optimum.streamline.models.architectures import head_size, key_value_heads
from optimum.streamline.system.distributed import from_main, is_main
from optimum.streamline.system.environment import package_version
from optimum.streamline.system.notify import Notify
from optimum.streamline.system.progress import Bar, progress_bar
from optimum.streamline.text.overlap import sketch_of
from optimum.streamline.text.prompts import Prompts
from optimum.streamline.text.windows import Windows

from .training_checkpoints import open_workspace

# The largest number of windows that are sampled at once. More are hardly faster per token, and show less progress.
MAX_BATCH = 64
# The cache of the windows that are sampled at once takes at most as many bytes as the weights, or this many if they are
# smaller. Healing takes several times the weights anyway.
MIN_CACHE_BYTES = 1 << 30
# Holds one batch of sampled texts: their tokens end to end, and the number of tokens of each.
_BATCH_FILE = "batch-{}.safetensors"


@contextmanager
def self_text_folder(out: Path) -> Iterator[Path]:
    """Provide the path of the folder that keeps sampled text inside the `with` block, and clean it up afterwards.

    The folder is deleted if the block succeeds. After any failure it stays for the next run, and a note on the
    exception says so.

    Args:
        out: The output, which this run has locked, so that no other run uses the files beside it.

    Yields:
        The path of the folder, which may not exist yet.
    """
    path = out.resolve()
    folder = path.with_name(f".{path.name}.self-text")
    try:
        yield folder
    except BaseException as error:
        if any(folder.glob(_BATCH_FILE.format("*"))):
            error.add_note(f"sampled text kept in {folder}: the same command uses it again")
        raise
    if is_main():
        shutil.rmtree(folder, ignore_errors=True)


def sample_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Prompts,
    *,
    seed: int,
    source: str,
    notify: Notify,
    folder: Path | None = None,
) -> Windows:
    """Sample windows from a model, in its own dtype, at temperature 1 and without top-k, top-p or penalties.

    A window begins with a prompt. Where the model ends its text, the next prompt follows, as the next document does in
    windows of other texts; the model does not see the text before it. Prompts are used again if there are too few. On
    one machine, the same arguments give the same text.

    Args:
        model: The original, in evaluation mode. It is unchanged afterwards.
        tokenizer: Its tokenizer.
        prompts: The prompts, and the number and length of the windows.
        seed: The seed of the sampling.
        source: The fingerprint of the model, which says whether text in `folder` is of this model.
        notify: Is told what is sampled, in one line.
        folder: Where each batch of sampled text is kept. Batches that are there already are not sampled again. `None`
            keeps none.

    Returns:
        The windows. In a distributed run the main process samples them, and every process gets them.

    Raises:
        StreamlineError: the model cannot generate text.
    """
    if not model.can_generate():
        raise StreamlineError(f"heal-data {prompts.spec!r}: {type(model).__name__} cannot generate text; give a text")
    at_once = windows_at_once(model, prompts.length)
    notify(f"sampling {prompts.count} windows of {prompts.length} tokens from the original, {at_once} at once")
    key = {"source": source, "prompts": prompts.fingerprint, "seed": str(seed), "windows": str(prompts.count)}
    key |= {"length": str(prompts.length), "at_once": str(at_once), "optimum-streamline": package_version()}
    if folder is not None and open_workspace(folder, key) and any(folder.glob(_BATCH_FILE.format("*"))):
        notify(f"continuing from the text sampled before, in {folder}")
    with progress_bar("sampling", prompts.count * prompts.length) as bar, _plain_sampling(model, tokenizer) as sampler:
        sampler.bar = bar
        ids = _filled(sampler, prompts, seed, at_once, folder)
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    return Windows(ids, prompts.spec, sampled=prompts.describe(), sketch=sketch_of(texts))


def windows_at_once(model: PreTrainedModel, length: int) -> int:
    """The number of windows that are sampled at once, by the memory of their cache.

    Args:
        model: The model.
        length: The number of tokens in each window.
    """
    config = model.config
    weights = sum(value.numel() * value.element_size() for value in model.parameters())
    numbers = 2 * config.num_hidden_layers * key_value_heads(config) * head_size(config)
    cache: int = numbers * model.dtype.itemsize * length
    return max(1, min(MAX_BATCH, max(weights, MIN_CACHE_BYTES) // cache))


def _filled(sampler: _Sampler, prompts: Prompts, seed: int, at_once: int, folder: Path | None) -> torch.Tensor:
    """Fill windows with sampled texts, batch by batch.

    Returns:
        Token ids `[windows, length]`.
    """
    ids = torch.zeros(prompts.count, prompts.length, dtype=torch.long)
    sizes = [0] * prompts.count
    waiting, starts = iter(range(prompts.count)), cycle(prompts.ids)
    windows, number = list(islice(waiting, at_once)), 0
    while windows:
        batch = [(next(starts), prompts.length - sizes[window]) for window in windows]
        sample = partial(sampler.texts, batch, random.Random(f"{seed} {number}").getrandbits(63))
        file = folder / _BATCH_FILE.format(f"{number:06}") if folder else None
        # The others wait for one batch at a time: a collective operation that waits for long is given up.
        texts = from_main(_kept(file, sample) if is_main() else [])
        for window, text in zip(windows, texts, strict=True):
            ids[window, sizes[window] : sizes[window] + len(text)] = torch.tensor(text)
            sizes[window] += len(text)
        sampler.bar.at(sum(sizes), "")
        windows = [window for window in windows if sizes[window] < prompts.length]
        windows += islice(waiting, at_once - len(windows))
        number += 1
    return ids


def _kept(file: Path | None, sample: Callable[[], list[list[int]]]) -> list[list[int]]:
    """The texts in a file, which are sampled and written first if it does not exist."""
    if file is None:
        return sample()
    if not file.exists():
        texts = sample()
        tokens = torch.tensor([token for text in texts for token in text], dtype=torch.int32)
        unfinished = file.with_suffix(".partial")
        save_file({"tokens": tokens, "sizes": torch.tensor([len(text) for text in texts])}, unfinished)
        unfinished.replace(file)
    held = load_file(file)
    return [text.tolist() for text in held["tokens"].split(held["sizes"].tolist())]


@contextmanager
def _plain_sampling(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Iterator[_Sampler]:
    """Provide a sampler of a model whose own settings of generation are set aside inside the `with` block.

    `generate` would fill every setting that is left out from them, such as a penalty for repetition.
    """
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield _Sampler(model, _ends_of_text(own, tokenizer))
    finally:
        model.generation_config = own


def _ends_of_text(own: GenerationConfig, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens that end a text: those at which the model stops, and the one that the tokenizer has for it."""
    stops = [own.eos_token_id] if isinstance(own.eos_token_id, int) else own.eos_token_id or []
    return {*stops, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])}


class _Sampler:
    """Samples texts from a model, in batches, with its key-value cache."""

    bar: Bar

    def __init__(self, model: PreTrainedModel, ends: set[int]) -> None:
        self._model, self._ends = model, ends

    def texts(self, batch: Sequence[tuple[Sequence[int], int]], seed: int) -> list[list[int]]:
        """Continue each prompt up to the model's end of the text, or for as long as there is room.

        Args:
            batch: For each text, its prompt and the largest number of tokens, prompt included.
            seed: The seed.

        Returns:
            The token ids of each text, prompt included. A prompt that is longer than its room is cut.
        """
        texts = [list(prompt[:room]) for prompt, room in batch]
        device = self._model.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            growing = [at for at, (prompt, room) in enumerate(batch) if len(prompt) < room]
            while growing:
                new = self._continued([texts[at] for at in growing], [batch[at][1] for at in growing])
                for at, tokens in zip(growing, new, strict=True):
                    texts[at] = (texts[at] + tokens)[: batch[at][1]]
                ended = [tokens[-1] in self._ends for tokens in new]
                growing = [
                    at for at, end in zip(growing, ended, strict=True) if not end and len(texts[at]) < batch[at][1]
                ]
        return texts

    def _continued(self, texts: list[list[int]], rooms: list[int]) -> list[list[int]]:
        """New tokens for each text, at least one: up to its end, or more than there is room for.

        A text gets fewer if another one reaches the largest position of the model, which padding brings nearer.
        """
        width, steps = max(map(len, texts)), max(room - len(text) for text, room in zip(texts, rooms, strict=True))
        longest = getattr(self._model.config, "max_position_embeddings", None)
        steps = steps if longest is None else min(steps, longest - width)
        padding = [[0] * (width - len(text)) for text in texts]
        rows = [zeros + text for zeros, text in zip(padding, texts, strict=True)]
        masks = [zeros + [1] * (width - len(zeros)) for zeros in padding]
        settings: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "use_cache": True}
        settings |= {"do_sample": True, "eos_token_id": sorted(self._ends) or None, "pad_token_id": 0}
        generator: Any = self._model  # for mypy: `generate` is not typed as a method
        found: torch.Tensor = generator.generate(
            torch.tensor(rows, device=generator.device),
            attention_mask=torch.tensor(masks, device=generator.device),
            generation_config=GenerationConfig(**settings, max_new_tokens=steps),
            stopping_criteria=[_Progress(self.bar)],
        )
        return [self._until_end(text) for text in found[:, width:].tolist()]

    def _until_end(self, tokens: list[int]) -> list[int]:
        """The tokens up to and with the first that ends a text; padding follows it."""
        return tokens[: next((at + 1 for at, token in enumerate(tokens) if token in self._ends), len(tokens))]


class _Progress(StoppingCriteria):
    """Moves a bar on with every sampled token, and stops nothing."""

    def __init__(self, bar: Bar) -> None:
        self._bar = bar

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self._bar.advance(len(input_ids))
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
