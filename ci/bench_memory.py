"""Measure the memory that healing takes by each setting, beside the estimate that `--dry-run` prints.

    ci/bench memory                 # measure every setting, then write the page; the largest takes 11 GB of memory
    ci/bench memory --only lora     # one setting
    ci/bench memory --page          # write the page; measure nothing

The checkpoint is a random Llama in bf16, made for the measurement. The figures go to docs/memory.json, and the tables
of docs/memory.md are written from them and from the formula of the estimate.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from transformers import LlamaConfig

from export_cases import REFERENCE, ROOT, make_checkpoint, run_measured, streamline
from marked_page import replace_part
from measured_parts import measure_parts
from optimum.streamline.costs.healing_memory import healing_memory
from optimum.streamline.models.linear_modules import meta_model
from optimum.streamline.recipe.parsing import make_recipe

PAGE, RESULTS = ROOT / "docs" / "memory.md", ROOT / "docs" / "memory.json"
# Layers, hidden size, intermediate size, heads, key-value heads, vocabulary. The layers are those of Llama 3.2 1B, half
# as many, with a smaller vocabulary, so that a training of all weights fits into 12 GB.
MEASURED = (8, 2048, 8192, 32, 8, 32_000)
SERVED = {
    "Llama 3.2 1B": (16, 2048, 8192, 32, 8, 128_256),
    "Llama 3.1 8B": (32, 4096, 14336, 32, 8, 128_256),
    "Llama 3.1 70B": (80, 8192, 28672, 64, 8, 128_256),
}
TIED = {"Llama 3.2 1B"}
TEXT = "stdlib:calibration"
# One window is held out; three updates are enough, because the first one makes the moments.
FEW_UPDATES: dict[str, Any] = {"layers": "3,5", "length": 256, "heal_tokens": 256 * 7, "heal_epochs": 1}
USUAL: dict[str, Any] = {"method": "shortgpt", "remove": "25%", "length": 2048}
NF4 = {"lora_base": "nf4", "heal_original": "nf4"}
SETTINGS: dict[str, dict[str, Any]] = {
    "adamw": {"heal": "distill"},
    "adamw-8bit": {"heal": "distill", "heal_optimizer": "adamw-8bit"},
    "checkpointing": {"heal": "distill", "gradient_checkpointing": True, "heal_micro_batch": 1},
    "cache": {"heal": "distill", "heal_cache": "top-64"},
    "bf16": {
        "heal": "distill",
        "heal_dtype": "bf16",
        "heal_optimizer": "adamw-8bit",
        "gradient_checkpointing": True,
        "heal_micro_batch": 1,
    },
    "original in nf4": {"heal": "distill", "heal_original": "nf4"},
    "lora": {"heal": "distill", "lora": True},
    "lora on nf4": {"heal": "distill", "lora": True, **NF4, "heal_micro_batch": 1, "max_memory": "3GB"},
    "local": {"heal": "local", "max_memory": "2GB"},
}
# The windows of the other rows are short. In this row activations take half, and not all logits are computed at once.
CASES = SETTINGS | {"long": {**SETTINGS["lora"], "length": 1024, "heal_tokens": 1024 * 3}}


def main() -> None:
    """Measure the cases of the command line, and write the page."""
    measure_parts(__doc__, {name: partial(measure, fields) for name, fields in CASES.items()}, RESULTS, write)


def measure(fields: dict[str, Any], folder: Path) -> dict[str, float]:
    """Heal a checkpoint by one case, and the reference model, which shows what the program itself takes."""
    checkpoint = make_checkpoint(folder / "in", MEASURED, "bfloat16")
    # The reference model always gets the short windows, so that it adds little to the program.
    runs = {REFERENCE: recipe_of(FEW_UPDATES, fields), checkpoint: recipe_of(fields, FEW_UPDATES)}
    program, peak = (
        run_measured(streamline("prune", "-m", model, folder / f"healed {model.name}", *flags(recipe)))[1]
        for model, recipe in runs.items()
    )
    found = {"peak_bytes": peak, "program_bytes": program}
    print(fields, found, flush=True)
    return found


def recipe_of(fields: dict[str, Any], others: dict[str, Any]) -> dict[str, Any]:
    """The fields of a recipe: some fields, others that give way to them, and what all cases have in common."""
    return {"calibration": TEXT, "heal_data": TEXT, "heal_batch": 2, **others, **fields}


def flags(fields: dict[str, Any]) -> list[str]:
    """The command line of a recipe's fields."""
    words = []
    for name, value in fields.items():
        words += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return words


def estimate(fields: dict[str, Any], amount: dict[str, Any], config: LlamaConfig) -> int:
    """The bytes that `--dry-run` says of a setting; with a limit of memory the weights stay on disk."""
    recipe = make_recipe(recipe_of(fields, amount))
    return healing_memory(recipe, config, on_disk=recipe.max_memory is not None).total


def llama(shape: tuple[int, ...], tied: bool) -> LlamaConfig:
    """The config of a Llama of this shape."""
    layers, width, inner, heads, kv, vocabulary = shape
    return LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=width,
        intermediate_size=inner,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
    )


def parameters(config: LlamaConfig) -> int:
    """The number of a model's weights."""
    return sum(each.numel() for each in meta_model(config).parameters())


def write(results: dict[str, Any]) -> None:
    """Write both tables of docs/memory.md."""
    replace_part(PAGE, "measured", measured_table(results))
    replace_part(PAGE, "estimated", estimated_table())


def measured_table(results: dict[str, Any]) -> list[str]:
    """What each setting took, beside its estimate."""
    config = llama(MEASURED, tied=True)
    weights = parameters(config)
    lines = [
        f"A random Llama of {weights / 1e9:.2f}B parameters in bf16 ({config.num_hidden_layers} layers of width "
        f"{config.hidden_size:,}, {config.vocab_size:,} tokens) loses layers {FEW_UPDATES['layers']}.",
        f"It heals on {FEW_UPDATES['heal_tokens']:,} tokens, two windows of {FEW_UPDATES['length']} tokens an update, "
        "but where a row says otherwise.",
        "",
        "| setting | peak of the process | program | bytes a parameter: measured | estimated | measured / estimated |",
        "|---|---|---|---|---|---|",
    ]
    for name in (each for each in CASES if each in results):
        fields, row = CASES[name], results[name]
        taken, expected = row["peak_bytes"] - row["program_bytes"], estimate(fields, FEW_UPDATES, config)
        lines.append(
            f"| {label(fields)} | {row['peak_bytes'] / 1e9:.2f} GB | {row['program_bytes'] / 1e9:.2f} GB | "
            f"{taken / weights:.1f} | {expected / weights:.1f} | {taken / expected:.2f} |"
        )
    return lines


def estimated_table() -> list[str]:
    """What the formula says of models that people serve."""
    configs = [llama(shape, name in TIED) for name, shape in SERVED.items()]
    names = [f"{name}, {parameters(config) / 1e9:.2f}B" for name, config in zip(SERVED, configs, strict=True)]
    lines = [f"| setting | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for fields in SETTINGS.values():
        amounts = (f"{estimate(fields, USUAL, config) / 1e9:,.0f} GB" for config in configs)
        lines.append(f"| {label(fields)} | {' | '.join(amounts)} |")
    return lines


def label(fields: dict[str, Any]) -> str:
    """How the page names a setting."""
    return f"`{' '.join(flags({name: each for name, each in fields.items() if name != 'max_memory'}))}`"


if __name__ == "__main__":
    main()
