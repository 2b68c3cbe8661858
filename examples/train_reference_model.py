"""Train the reference model, or a benchmark model, on the running Python's standard library, and write its model card.

    python examples/train_reference_model.py train OUT     # an hour on two cores, then the card
    python examples/train_reference_model.py train OUT --architecture qwen3 --device cuda
    python examples/train_reference_model.py card OUT      # the card and its plots alone

The reference model is a Llama with grouped-query attention, small enough to live in the repository and deep enough
that layer pruning on it means something. The Qwen3 and the GPT-2 of the benchmarks are smaller. Those
in the repository were trained with `--device cuda --fp32 --batch 16 --minutes 2.1`. The text is split by file
(`stdlib:train|calibration|eval`), so what the tests and benchmarks calibrate and judge on was never trained on.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import time
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    get_cosine_with_min_lr_schedule_with_warmup,
)

from optimum.streamline.editing.apply import apply_plan
from optimum.streamline.editing.plan import Plan
from optimum.streamline.scoring.similarity import measure_scores
from optimum.streamline.system.environment import describe_machine
from optimum.streamline.text.sources import open_text
from optimum.streamline.text.windows import read_windows

VOCABULARY = 4096
LENGTH = 512
END = "<|endoftext|>"


def train_tokenizer(documents: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer, so that no input is unknown to it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END, model_max_length=LENGTH
    )


def library(part: str, seed: int) -> list[str]:
    """The files of a part of the standard library, in an order that `seed` decides."""
    documents = list(open_text(f"stdlib:{part}").documents)
    random.Random(seed).shuffle(documents)
    return documents


def encode(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> torch.Tensor:
    """All documents as one row of token ids, each closed by the end token."""
    ids = [[*tokens, tokenizer.eos_token_id] for tokens in tokenizer(documents)["input_ids"]]
    return torch.tensor([token for tokens in ids for token in tokens])


# The reference model, and two of other architectures that the benchmarks compare it with.
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "num_hidden_layers": 16,
    "num_attention_heads": 4,
    "max_position_embeddings": LENGTH,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
}
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 128, "intermediate_size": 384, "num_key_value_heads": 2},
    "qwen3": {"hidden_size": 96, "intermediate_size": 288, "num_key_value_heads": 2, "head_dim": 24},
    # No dropout, as the others; with it torch has no fast attention on a CPU.
    "gpt2": {"hidden_size": 96, "n_inner": 384, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
}
# What the card says of each: its title, the kind of model, what is special about it, and what it is for.
GROUPED = "grouped-query attention, tied embeddings"
CARDS = {
    "llama": ("The reference model", "Llama", GROUPED, "tests, benchmarks and the demo"),
    "qwen3": ("The Qwen3 of the benchmarks", "Qwen3", GROUPED, "benchmarks"),
    "gpt2": ("The GPT-2 of the benchmarks", "GPT-2", "learned positions, tied embeddings", "benchmarks"),
}
# Minutes, windows an update and peak learning rate. Those of the small ones are for one CPU core, where GPT-2 learns
# less with more windows an update, and at a higher rate.
TRAINING = {"llama": (60.0, 8, 3e-3), "qwen3": (35.0, 8, 3e-3), "gpt2": (35.0, 4, 1e-3)}


def build_model(architecture: str, seed: int) -> PreTrainedModel:
    """The untrained model: 16 layers, four query heads (to two key-value heads where there is a choice)."""
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(architecture, **COMMON, **SHAPES[architecture]), dtype=torch.float32
    )
    return model


@torch.no_grad()
def perplexity(model: PreTrainedModel, tokens: torch.Tensor, windows: int = 64) -> float:
    """Token-weighted perplexity over the first `windows` windows of `LENGTH` tokens."""
    model.eval()
    rows = tokens[: windows * LENGTH].view(-1, LENGTH).to(model.device)
    losses = [model(batch, labels=batch).loss.item() for batch in rows.split(8)]
    model.train()
    return math.exp(sum(losses) / len(losses))


def train(
    out: Path, architecture: str, minutes: float, batch: int, peak: float, seed: int, fp32: bool, device: str
) -> None:
    """Train for `minutes`: the learning rate follows the clock, so a slower machine only sees fewer tokens."""
    documents = library("train", seed)
    tokenizer = train_tokenizer(documents)
    tokens = encode(tokenizer, documents)
    held_out = encode(tokenizer, library("eval", seed))
    model = build_model(architecture, seed)
    module: torch.nn.Module = model  # transformers' own `to` carries no types
    module.to(device)
    # Not on a GPU: there it takes longer to compile so small a model than it saves in a few minutes.
    compiled = torch.compile(model) if device == "cpu" else model
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.95))
    ticks = 10_000
    schedule = get_cosine_with_min_lr_schedule_with_warmup(optimizer, ticks // 50, ticks, min_lr_rate=0.02)
    generator = torch.Generator().manual_seed(seed)
    log: list[dict[str, float]] = []
    start, step, tick, recent = time.monotonic(), 0, 0, 0.0
    while (elapsed := time.monotonic() - start) < 60 * minutes:
        offsets = torch.randint(len(tokens) - LENGTH, (batch,), generator=generator).tolist()
        rows = torch.stack([tokens[offset : offset + LENGTH] for offset in offsets]).to(device)
        with torch.autocast(device, dtype=torch.bfloat16, enabled=not fp32):
            loss = compiled(rows, labels=rows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        while tick < ticks * elapsed / (60 * minutes):
            schedule.step()
            tick += 1
        recent = loss.item() if step == 0 else 0.98 * recent + 0.02 * loss.item()
        step += 1
        if step % 200 == 0:
            row = {
                "step": step,
                "tokens": step * batch * LENGTH,
                "minutes": round((time.monotonic() - start) / 60, 2),
                "train_loss": round(recent, 4),
                "eval_perplexity": round(perplexity(model, held_out, 16), 3),
            }
            log.append(row)
            print(json.dumps(row), flush=True)
    module.to("cpu", torch.bfloat16)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    machine = describe_machine(device)
    summary = {
        "python": machine["python"],
        "torch": torch.__version__,
        "seed": seed,
        "train_tokens": len(tokens),
        "tokens_seen": step * batch * LENGTH,
        "trained_on": f"one {machine['gpu']}" if device == "cuda" else f"{machine['cores']} CPU cores",
        "minutes": round((time.monotonic() - start) / 60, 1),
        "eval_perplexity": round(perplexity(model.float(), held_out), 3),
        "log": log,
    }
    (out / "training_log.json").write_text(json.dumps(summary, indent=1))
    print({key: value for key, value in summary.items() if key != "log"})


def drop_one_layer(model: PreTrainedModel, tokens: torch.Tensor) -> list[float]:
    """Perplexity of the model without each of its layers in turn."""
    without = []
    for layer in range(model.config.num_hidden_layers):
        shallower = copy.deepcopy(model)
        apply_plan(shallower, Plan(model.config.num_hidden_layers, (layer,)), None)
        without.append(perplexity(shallower, tokens))
    return without


def plot(out: Path, dense: float, without: list[float], log: list[dict[str, float]]) -> None:
    """The two plots of the card: perplexity without each layer, and perplexity while training."""
    plt.rcParams.update({"svg.hashsalt": "reference model", "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(figsize=(7, 3), layout="constrained")
    axes.bar(range(len(without)), without, color="#4477aa")
    axes.axhline(dense, color="#cc6677", label=f"all layers: {dense:.1f}")
    axes.set(
        xlabel="layer left out", ylabel="evaluation perplexity (log scale)", yscale="log", xticks=range(len(without))
    )
    axes.legend(frameon=False)
    figure.savefig(out / "drop_one_layer.svg", metadata={"Date": None})
    figure, axes = plt.subplots(figsize=(7, 3), layout="constrained")
    axes.plot([row["tokens"] / 1e6 for row in log], [row["eval_perplexity"] for row in log], color="#4477aa")
    axes.set(xlabel="million tokens seen", ylabel="evaluation perplexity (log scale)", yscale="log")
    figure.savefig(out / "training.svg", metadata={"Date": None})


def card(out: Path) -> None:
    """Measure the trained model and write its card."""
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(out)
    tokens = encode(tokenizer, library("eval", 0))
    summary = json.loads((out / "training_log.json").read_text())
    dense, without = perplexity(model, tokens), drop_one_layer(model, tokens)
    calibration = read_windows("stdlib:calibration", tokenizer, 64, LENGTH, 0, VOCABULARY)
    influence = measure_scores(model, calibration).block_influence
    plot(out, dense, without, summary["log"])
    rows = [f"| {i} | {ppl:.2f} | {bi:.4f} |" for i, (ppl, bi) in enumerate(zip(without, influence, strict=True))]
    log = summary["log"][:: max(1, len(summary["log"]) // 12)]
    steps = [
        f"| {r['step']} | {r['tokens'] / 1e6:.1f} | {r['train_loss']:.3f} | {r['eval_perplexity']:.2f} |" for r in log
    ]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    title, kind, details, purpose = CARDS[model.config.model_type]
    (out / "README.md").write_text(
        f"""---
library_name: transformers
pipeline_tag: text-generation
license: apache-2.0
---

# {title}

A small {kind} ({model.config.num_hidden_layers} layers of width {model.config.hidden_size}, {parameters:,} parameters,
{details}) trained on the source of the Python {summary["python"]} standard library,
for {purpose}. It is good for nothing else.

- Trained by `examples/train_reference_model.py train` for {summary["minutes"]} minutes on {summary["trained_on"]}:
  {summary["tokens_seen"] / 1e6:.1f} million tokens, {summary["tokens_seen"] / summary["train_tokens"]:.1f} passes
  over the `stdlib:train` files. This card is written by `examples/train_reference_model.py card`.
- Evaluation perplexity (`stdlib:eval`, files never trained on, 64 windows of {LENGTH} tokens): **{dense:.2f}**.
  An untrained model has about {VOCABULARY}.

## Depth redundancy

Perplexity with one layer left out, and the layer's Block Influence on `stdlib:calibration`.

![Perplexity without each layer](drop_one_layer.svg)

| layer left out | perplexity | Block Influence |
|---|---|---|
{chr(10).join(rows)}

## Training log

Every {200 * max(1, len(summary["log"]) // 12)} steps; `training_log.json` has every 200.
The perplexity here is over the first 16 windows.

![Evaluation perplexity while training](training.svg)

| step | million tokens | training loss | evaluation perplexity |
|---|---|---|---|
{chr(10).join(steps)}
"""
    )


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("action", choices=["train", "card"])
    parser.add_argument("out", type=Path)
    parser.add_argument("--architecture", choices=sorted(SHAPES), default="llama")
    parser.add_argument("--minutes", type=float, help="by architecture unless told, as --batch and --lr")
    parser.add_argument("--batch", type=int, help="windows an update")
    parser.add_argument("--lr", type=float, help="peak learning rate")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--fp32", action="store_true", help="train in fp32: far faster on a CPU without bf16 arithmetic"
    )
    args = parser.parse_args()
    if args.action == "train":
        minutes, batch, peak = TRAINING[args.architecture]
        how = (args.minutes or minutes, args.batch or batch, args.lr or peak, args.seed, args.fp32, args.device)
        train(args.out, args.architecture, *how)
    card(args.out)


if __name__ == "__main__":
    main()
