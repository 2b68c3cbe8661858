"""Do the intervals of a validation hold what they say, and what do windows that begin with nothing cost?

    ci/bench validation                    # everything, then the page
    ci/bench validation --only coverage    # how often 95% intervals hold the whole text's value
    ci/bench validation --only prefix      # a model trained on windows that begin with a token of the beginning
    ci/bench validation --page             # measure nothing

The population is every window of the reference model's evaluation text (`stdlib:eval`); the models are it and a prune
of it. Numbers go to docs/validation.json; docs/validation.md is written from that.
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
from optimum.streamline.checkpoints.source import ModelSource
from optimum.streamline.evaluation.accuracy import Accuracy
from optimum.streamline.evaluation.intervals import Interval
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
# Of the model with a beginning.
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

Places = npt.NDArray[np.int64]


def main() -> None:
    """Measure what was asked for, and write the page."""
    parts = {name: _timed(part) for name, part in (("coverage", measure_coverage), ("prefix", measure_prefix))}
    measure_parts(__doc__, parts, RESULTS, write_page)


def _timed(part: Callable[[], dict[str, Any]]) -> Callable[[Path], dict[str, Any]]:
    def measure(_: Path) -> dict[str, Any]:
        start = time.monotonic()
        return {**part(), "seconds": round(time.monotonic() - start)}

    return measure


def population(tokenizer: PreTrainedTokenizerBase, part: str, length: int = LENGTH) -> Windows:
    """A part of the library cut into windows, end to end, with the document that each begins in."""
    writer, stream, documents = WindowEncoder(tokenizer), list[int](), list[int]()
    for number, tokens in enumerate(writer.encode(list(open_text(f"stdlib:{part}").documents))):
        stream += tokens + writer.ending
        documents += [number] * (len(tokens) + len(writer.ending))
    count = len(stream) // length
    ids = torch.tensor(stream[: count * length]).view(count, length)
    return Windows(ids, f"stdlib:{part}", documents=tuple(documents[: count * length : length]))


def measure_coverage() -> dict[str, Any]:
    """The share of draws whose 95% interval holds the whole text's value, by size, way of drawing and figure."""
    source = ModelSource(str(REFERENCE))
    windows = population(load_tokenizer(source), "eval")
    prepared = prepare(source, make_recipe(PRUNING), lambda _: None)
    change(prepared, lambda _: None)
    models = [load_stock(source, torch.float32), prepared.model]
    original, pruned = _measured(models, windows)
    characters = np.array([len(text) for text in load_tokenizer(source).batch_decode(windows.ids)], np.float64)
    rows = [
        {"way": name, "windows": size, "share": _held(original, pruned, way, size, grouped)}
        for name, (way, grouped) in GRAPH_QUANTIZERS.items()
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
    """What `measure_accuracy` sums over each window, of many windows at once and in float32: two models in minutes."""
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
    original: Accuracy, pruned: Accuracy, way: Callable[[np.random.Generator, int, int], Places], size: int, by: bool
) -> dict[str, float]:
    """Of each figure, the share of draws of `size` windows whose interval holds the value of all windows."""
    print(way.__name__, size, "documents" if by else "windows", flush=True)
    whole = {name: interval.value for name, interval in _figures(original, pruned, 0).items()}
    held = dict.fromkeys(whole, 0)
    chance = np.random.default_rng(0)
    for sample_windows in range(DRAWS):
        new_layers = way(chance, len(original.loss), size)
        one, other = (_some(each, new_layers, by) for each in (original, pruned))
        for name, interval in _figures(one, other, sample_windows).items():
            held[name] += interval.low <= whole[name] <= interval.high
    return {name: count / DRAWS for name, count in held.items()}


def _figures(original: Accuracy, pruned: Accuracy, seed: int) -> dict[str, Interval]:
    return {
        "perplexity": original.perplexity(seed),
        "ratio": pruned.perplexity_ratio(original, seed),
        "kl": pruned.mean_kl(seed),
        "agreement": pruned.mean_agreement(seed),
    }


def _some(accuracy: Accuracy, new_layers: Places, by_document: bool) -> Accuracy:
    """What was measured on some of the windows only."""
    sums = {name: getattr(accuracy, name)[new_layers] for name in SUMS}
    documents = tuple(accuracy.documents[place] for place in new_layers) if by_document else ()
    return replace(accuracy, **sums, documents=documents)


def _weighted(original: Accuracy, pruned: Accuracy, weights: npt.NDArray[np.float64]) -> dict[str, float]:
    """The whole text's figures if every window counted by its characters, as places drawn over a text make it."""
    times = weights / weights.mean()
    one, other = (
        replace(each, **{name: getattr(each, name) * times for name in SUMS}, documents=())
        for each in (original, pruned)
    )
    return {name: interval.value for name, interval in _figures(one, other, 0).items()}


def anywhere(chance: np.random.Generator, count: int, size: int) -> Places:
    """Windows at random over the text."""
    return chance.choice(count, size, replace=False)


def in_a_row(chance: np.random.Generator, count: int, size: int) -> Places:
    """Windows one after another, as the head of a text in another order of its files gives them."""
    return int(chance.integers(count - size + 1)) + np.arange(size)


GRAPH_QUANTIZERS: dict[str, tuple[Callable[[np.random.Generator, int, int], Places], bool]] = {
    "at random, by document": (anywhere, True),
    "at random, by window": (anywhere, False),
    "one after another, by document": (in_a_row, True),
    "one after another, by window": (in_a_row, False),
}


def measure_prefix() -> dict[str, Any]:
    """Perplexity of the same tokens with and without the token that all windows of the training began with."""
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
    """Train on windows from anywhere, each after the token of the beginning; the last loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.1, betas=(0.9, 0.95))
    schedule = get_cosine_schedule_with_warmup(optimizer, UPDATES // 10, UPDATES)
    chance = torch.Generator().manual_seed(0)
    for _ in range(UPDATES):
        starts = torch.randint(len(tokens) - LENGTH, (BATCH,), generator=chance)
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
    """Log-loss of the last `LENGTH - 1` tokens of each window, nats."""
    sums = []
    for rows in torch.split(ids, BATCH):
        logits = model(rows, use_cache=False).logits[:, -LENGTH:-1].float()
        loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), rows[:, 1 - LENGTH :], reduction="none")
        sums.append(loss.double().sum(1))
    return torch.cat(sums).numpy()


if __name__ == "__main__":
    main()
