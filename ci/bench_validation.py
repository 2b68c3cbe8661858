"""Measure the coverage of the intervals of a validation, and the cost of windows without a beginning-of-text token.

    ci/bench validation                    # measure both parts, then write the page
    ci/bench validation --only coverage    # the share of 95% intervals that contain the whole text's value
    ci/bench validation --only prefix      # a model trained on windows that start with a beginning-of-text token
    ci/bench validation --page             # write the page; measure nothing

For coverage, the population is every window of the reference model's evaluation text (`stdlib:eval`), and the models
are the reference model and a pruned one. The figures go to docs/validation.json, and the tables of docs/validation.md
are written from them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    get_cosine_schedule_with_warmup,
)

from export_cases import REFERENCE, ROOT
from measured_parts import measure_parts
from optimum.streamline.checkpoints.loading import load_stock, load_tokenizer
from optimum.streamline.evaluation.accuracy import Accuracy
from optimum.streamline.evaluation.intervals import Interval
from optimum.streamline.model_files.source import ModelSource
from optimum.streamline.pipeline.prune import change, prepare
from optimum.streamline.recipe.parsing import make_recipe
from optimum.streamline.text.sampling import WindowEncoder
from optimum.streamline.text.sources import open_text
from optimum.streamline.text.windows import Windows
from validation_page import write_page

RESULTS = ROOT / "docs" / "validation.json"
LENGTH = 128
SIZES = (8, 16, 32, 64, 128)
DRAWS = 400
SUMS = ("loss", "kl", "agreement", "tokens")
PRUNING: dict[str, Any] = {
    "method": "shortgpt",
    "remove": "25%",
    "calibration": "stdlib:calibration",
    "samples": 64,
    "length": LENGTH,
}
# The config of the model for `--only prefix`.
SHAPE: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": LENGTH + 1,
    "tie_word_embeddings": True,
}
UPDATES, BATCH, RATE, JUDGED = 500, 16, 3e-3, 256

Indices = npt.NDArray[np.int64]


def main() -> None:
    """Measure the parts of the command line, and write the page."""
    parts = {name: _timed(part) for name, part in (("coverage", measure_coverage), ("prefix", measure_prefix))}
    measure_parts(__doc__, parts, RESULTS, write_page)


def _timed(part: Callable[[], dict[str, Any]]) -> Callable[[Path], dict[str, Any]]:
    def measure(_: Path) -> dict[str, Any]:
        start = time.monotonic()
        return {**part(), "seconds": round(time.monotonic() - start)}

    return measure


def population(tokenizer: PreTrainedTokenizerBase, part: str, length: int = LENGTH) -> Windows:
    """All windows of a part of the standard library's text, end to end, with the document that each begins in.

    Args:
        tokenizer: The tokenizer.
        part: `train`, `calibration` or `eval`.
        length: The tokens of a window.
    """
    writer, stream, documents = WindowEncoder(tokenizer), list[int](), list[int]()
    for number, tokens in enumerate(writer.encode(list(open_text(f"stdlib:{part}").documents))):
        stream += tokens + writer.ending
        documents += [number] * (len(tokens) + len(writer.ending))
    count = len(stream) // length
    ids = torch.tensor(stream[: count * length]).view(count, length)
    return Windows(ids, f"stdlib:{part}", documents=tuple(documents[: count * length : length]))


def measure_coverage() -> dict[str, Any]:
    """The share of draws whose 95% interval contains the whole text's value, by sampling, size and figure."""
    source = ModelSource(str(REFERENCE))
    windows = population(load_tokenizer(source), "eval")
    prepared = prepare(source, make_recipe(PRUNING), lambda _: None)
    change(prepared, lambda _: None)
    models = [load_stock(source, torch.float32), prepared.model]
    original, pruned = _measured(models, windows)
    characters = np.array([len(text) for text in load_tokenizer(source).batch_decode(windows.ids)], np.float64)
    rows = [
        {"way": name, "windows": size, "share": _held(original, pruned, draw, size, by_document)}
        for name, (draw, by_document) in SAMPLINGS.items()
        for size in SIZES
    ]
    whole = {name: interval.value for name, interval in _figures(original, pruned, 0).items()}
    return {
        "population": {"windows": len(windows.ids), "length": LENGTH, "documents": len(set(windows.documents))},
        "draws": DRAWS,
        "whole": whole,
        "by_characters": _weighted(original, pruned, characters),
        "rows": rows,
    }


@torch.inference_mode()
def _measured(models: Sequence[PreTrainedModel], windows: Windows) -> list[Accuracy]:
    """The sums per window that `measure_accuracy` makes, but in batches and in float32, which is faster."""
    sums: list[list[torch.Tensor]] = [[] for _ in models]
    for ids in torch.split(windows.ids, BATCH):
        logs = [model(ids, use_cache=False).logits[:, :-1].float().log_softmax(-1) for model in models]
        for own, log in zip(sums, logs, strict=True):
            loss = -log.gather(-1, ids[:, 1:, None])[..., 0]
            kl = (logs[0].exp() * (logs[0] - log)).sum(-1)
            agreed = logs[0].argmax(-1) == log.argmax(-1)
            own.append(torch.stack([each.double().sum(1) for each in (loss, kl, agreed)]))
    tokens = np.full(len(windows.ids), windows.ids.shape[1] - 1, np.float64)
    whole = [torch.cat(own, dim=1).numpy() for own in sums]
    return [Accuracy(loss, kl, agreement, tokens, windows.documents) for loss, kl, agreement in whole]


def _held(
    original: Accuracy,
    pruned: Accuracy,
    draw: Callable[[np.random.Generator, int, int], Indices],
    size: int,
    by_document: bool,
) -> dict[str, float]:
    """For each figure, the share of draws of `size` windows whose interval contains the value of all windows."""
    print(draw.__name__, size, "documents" if by_document else "windows", flush=True)
    whole = {name: interval.value for name, interval in _figures(original, pruned, 0).items()}
    held = dict.fromkeys(whole, 0)
    random = np.random.default_rng(0)
    for seed in range(DRAWS):
        drawn = draw(random, len(original.loss), size)
        one, other = (_some(each, drawn, by_document) for each in (original, pruned))
        for name, interval in _figures(one, other, seed).items():
            held[name] += interval.low <= whole[name] <= interval.high
    return {name: count / DRAWS for name, count in held.items()}


def _figures(original: Accuracy, pruned: Accuracy, seed: int) -> dict[str, Interval]:
    return {
        "perplexity": original.perplexity(seed),
        "ratio": pruned.perplexity_ratio(original, seed),
        "kl": pruned.mean_kl(seed),
        "agreement": pruned.mean_agreement(seed),
    }


def _some(accuracy: Accuracy, drawn: Indices, by_document: bool) -> Accuracy:
    """The measurements of the drawn windows; without their documents unless intervals are resampled by document."""
    sums = {name: getattr(accuracy, name)[drawn] for name in SUMS}
    documents = tuple(accuracy.documents[index] for index in drawn) if by_document else ()
    return replace(accuracy, **sums, documents=documents)


def _weighted(original: Accuracy, pruned: Accuracy, weights: npt.NDArray[np.float64]) -> dict[str, float]:
    """The whole text's figures with each window weighted by its characters, as if positions in the text were drawn."""
    times = weights / weights.mean()
    one, other = (
        replace(each, **{name: getattr(each, name) * times for name in SUMS}, documents=())
        for each in (original, pruned)
    )
    return {name: interval.value for name, interval in _figures(one, other, 0).items()}


def anywhere(random: np.random.Generator, count: int, size: int) -> Indices:
    """The indices of `size` of `count` windows, drawn at random without replacement."""
    return random.choice(count, size, replace=False)


def in_a_row(random: np.random.Generator, count: int, size: int) -> Indices:
    """The indices of `size` of `count` windows in a row from a random start, as if the text had been cut off."""
    return int(random.integers(count - size + 1)) + np.arange(size)


SAMPLINGS: dict[str, tuple[Callable[[np.random.Generator, int, int], Indices], bool]] = {
    "at random, by document": (anywhere, True),
    "at random, by window": (anywhere, False),
    "one after another, by document": (in_a_row, True),
    "one after another, by window": (in_a_row, False),
}


def measure_prefix() -> dict[str, Any]:
    """The perplexity of the same tokens with and without the beginning-of-text token of all training windows."""
    torch.manual_seed(0)
    tokenizer = load_tokenizer(ModelSource(str(REFERENCE)))
    training = population(tokenizer, "train").ids.flatten()
    beginning = len(tokenizer)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=beginning + 1, **SHAPE))
    last = _train(model, training, beginning)
    judged = population(tokenizer, "eval").ids
    ids = judged[:: max(1, len(judged) // JUDGED)]
    without, with_it = (_losses(model, _begun(ids, beginning, begun)) for begun in (False, True))
    tokens = np.full(len(ids), LENGTH - 1, np.float64)
    nothing = np.zeros(len(ids))
    plain = Accuracy(without, nothing, nothing, tokens)
    begun = Accuracy(with_it, nothing, nothing, tokens)
    return {
        "updates": UPDATES,
        "tokens": UPDATES * BATCH * LENGTH,
        "training_loss": last,
        "parameters": model.num_parameters(),
        "windows": len(ids),
        "with": vars(begun.perplexity(0)),
        "without": vars(plain.perplexity(0)),
        "ratio": vars(plain.perplexity_ratio(begun, 0)),
    }


def _begun(ids: torch.Tensor, beginning: int, begun: bool) -> torch.Tensor:
    return torch.cat([torch.full((len(ids), 1), beginning), ids], dim=1) if begun else ids


def _train(model: LlamaForCausalLM, tokens: torch.Tensor, beginning: int) -> float:
    """Train on windows from random positions, each after a beginning-of-text token; returns the last loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.1, betas=(0.9, 0.95))
    schedule = get_cosine_schedule_with_warmup(optimizer, UPDATES // 10, UPDATES)
    random = torch.Generator().manual_seed(0)
    for _ in range(UPDATES):
        starts = torch.randint(len(tokens) - LENGTH, (BATCH,), generator=random)
        ids = _begun(torch.stack([tokens[at : at + LENGTH] for at in starts.tolist()]), beginning, True)
        step = model(ids, labels=ids).loss
        step.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.train(False)
    return float(step.item())


@torch.inference_mode()
def _losses(model: LlamaForCausalLM, ids: torch.Tensor) -> npt.NDArray[np.float64]:
    """The sum of the losses of the last `LENGTH - 1` tokens of each window, in nats, `[windows]`."""
    sums = []
    for rows in torch.split(ids, BATCH):
        logits = model(rows, use_cache=False).logits[:, -LENGTH:-1].float()
        loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), rows[:, 1 - LENGTH :], reduction="none")
        sums.append(loss.double().sum(1))
    return torch.cat(sums).numpy()


if __name__ == "__main__":
    main()
