"""Flags that several commands share, and their help."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

SPEC = (
    "a text file, a table (FILE[,COLUMN]), a folder of these,\n"
    "hub:DATASET[@REVISION][,CONFIG[,SPLIT[,COLUMN]]], or stdlib"
)


# As in `optimum.streamline.recipe`; a test compares.
CHOOSING_TEXT = "hub:Salesforce/wikitext,wikitext-103-raw-v1,train"


JUDGING_TEXT = "hub:Salesforce/wikitext,wikitext-103-raw-v1,test"


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Add `-m/--model`, and how it may be read."""
    parser.add_argument(
        "-m", "--model", required=True, help="a checkpoint's folder, or a Hub id, also as name@revision"
    )
    add_source_flags(parser)


def add_source_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags on how models may be read."""
    parser.add_argument("--revision", help="branch, tag or commit of the Hub model (default: its main branch)")
    parser.add_argument("--cache_dir", help="where Hub downloads are kept")
    parser.add_argument("--trust-remote-code", action="store_true", help="let code from the checkpoint run")
    parser.add_argument("--verbose", action="store_true", help="show what other libraries say, too")


def add_recipe_flag(group: Any, flag: str, text: str, kind: Callable[[str], Any] = str) -> None:
    """Add a flag that sets a field of the recipe."""
    # A flag that is not given leaves no trace, so that a recipe file's value, or the default, stands.
    group.add_argument(flag, default=argparse.SUPPRESS, type=kind, help=text, metavar=flag.strip("-").upper())


def add_recipe_switch(group: Any, flag: str, text: str) -> None:
    """Add a flag without a value that sets a field of the recipe to true."""
    group.add_argument(flag, default=argparse.SUPPRESS, action="store_true", help=text)


def add_calibration_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags on calibration text."""
    group = parser.add_argument_group("calibration")
    add_recipe_flag(group, "--calibration", f"text the choices are made on: {SPEC}\n(default {CHOOSING_TEXT})")
    add_recipe_flag(group, "--samples", "calibration windows (default 128); auto reads some more", int)
    add_shared_recipe_flags(group)


def add_shared_recipe_flags(group: Any) -> None:
    """Add the flags that calibration, healing and evaluation share."""
    add_recipe_flag(group, "--length", "tokens a window (default 512)", int)
    add_recipe_flag(group, "--device", "cpu (default) or cuda")
    add_recipe_flag(group, "--seed", "of everything random (default 0)", int)


def add_pruning_flags(parser: argparse.ArgumentParser, quantizes: bool = True) -> None:
    """Add the flags of a pruning."""
    group = parser.add_argument_group("what to remove")
    methods = "\n".join(f"  {name}: {line}" for name, line in METHOD_LINES.items())
    add_recipe_flag(
        group,
        "--method",
        "how layers are chosen; left out, explicit with --layers, shortgpt with --replacement linear,\n"
        f"llm-streamline with any other --replacement but none, else auto:\n{methods}",
    )
    add_recipe_flag(group, "--remove", "layers to lose, net (4), or a share of them (25%%)")
    add_recipe_flag(group, "--layers", "explicit layers, 0-based, such as 3,7,11-13")
    add_recipe_switch(group, "--iterative", "shortgpt: score anew after each removal")
    add_recipe_flag(
        group,
        "--protect",
        "how many of the first and of the last layers stay (default of sleb: 1,1; of shortened-taylor: 4,2;\n"
        "of shortened-ppl: 0,0; the other methods have no such choice)",
    )
    add_recipe_flag(group, "--pattern", "layerchop: max-gap (default), input, output, middle or both")
    group = parser.add_argument_group("what stands in for it")
    add_recipe_flag(
        group,
        "--replacement",
        "none (default, but for llm-streamline, whose is layer, and auto, which unhealed may choose linear);\n"
        "linear: a least-squares map, folded into the layer before;\nor, for one block, a trained "
        "layer: layer (a decoder layer), mlp (one without attention),\nffn or swiglu (no norm, no residual: needs "
        "optimum.streamline.load)",
    )
    add_healing_flags(parser)
    group = parser.add_argument_group("what it is made on")
    add_recipe_flag(group, "--dtype", "what the result is stored in: fp32, fp16 or bf16 (default: as the original)")
    add_calibration_flags(parser)
    if quantizes:
        add_quantization_flags(parser)


def add_healing_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags on healing."""
    group = parser.add_argument_group("healing")
    add_recipe_flag(
        group,
        "--heal",
        "none, or trainings joined by +: hidden-mse (the replacement, to its block's output; default where there is "
        "one),\nlm (cross-entropy), distill (to the original's logits and hidden states);\n"
        "default of auto, come-sp and come-mp: distill; of layerchop: lm; of the others: none",
    )
    add_recipe_flag(
        group,
        "--heal-scope",
        "what lm and distill train: replacement or model (default: replacement for an lm that comes first,\n"
        "with a trained replacement, and with --lora if a training follows; else model)",
    )
    add_recipe_flag(group, "--heal-data", f"text it is trained on: {SPEC}\n(default {CHOOSING_TEXT})")
    add_recipe_flag(group, "--heal-tokens", "tokens to train on (default 200000)", int)
    add_recipe_flag(
        group,
        "--heal-minutes",
        "longest time of each training, shared out among come-mp's merges (default: no limit)",
        float,
    )
    add_recipe_flag(
        group, "--heal-lr", "peak learning rate (default: by what is trained, to what, and the model's width)", float
    )
    add_recipe_flag(group, "--heal-epochs", "passes over these tokens (default 4: each is seen four times)", int)
    add_recipe_flag(
        group, "--heal-batch", "windows an update, over all processes: a multiple of their number (default 4)", int
    )
    add_recipe_switch(group, "--heal-normalised", "hidden-mse: divide each token's error by its squared norm")
    add_recipe_flag(group, "--heal-kl", "distill: share of the KL, the rest is cross-entropy (default 1)", float)
    add_recipe_flag(group, "--heal-hidden", "distill: weight of the layers' hidden-state error (default 10)", float)
    add_recipe_switch(group, "--lora", "train low-rank adapters, merged before saving, not the weights")
    add_recipe_flag(group, "--lora-rank", "their rank (default 16)", int)


def add_quantization_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags on quantization."""
    group = parser.add_argument_group("quantization")
    lines = "\n".join(f"  {name}: {line}" for name, line in CHECKPOINT_QUANTIZATION_LINES.items())
    add_recipe_flag(
        group,
        "--quantize",
        f"none (default); of the checkpoint, one of\n{lines}\n"
        f"or of the ONNX export, where there is one, {', '.join(QUANTIZATION_LINES)}",
    )
    add_recipe_flag(
        group,
        "--quantize-exclude",
        "what stays in float, by commas: numbers of this model's layers, and modules such as *.mlp.down_proj",
    )
    add_recipe_flag(group, "--steps", "prune,quantize (default) or quantize,prune, which can only remove layers")


def add_evaluation_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags on evaluation text and the budget."""
    group = parser.add_argument_group("judgement")
    add_recipe_flag(group, "--eval-data", f"text the result is judged on: {SPEC}\n(default {JUDGING_TEXT})")
    add_recipe_flag(group, "--eval-samples", "evaluation windows (default 64)", int)
    add_recipe_flag(group, "--max-ppl-ratio", "largest perplexity over the original's", float)
    add_recipe_flag(group, "--max-kl", "largest KL(original || candidate), nats per token", float)
    add_recipe_flag(group, "--min-speedup", "least decode speed-up over the original in the same runtime", float)
    add_recipe_flag(group, "--max-size-ratio", "largest size on disk over the original's in the same runtime", float)
    add_recipe_flag(
        group,
        "--judge",
        "what must be within each limit: bound (default), the whole interval of a figure; or point, the figure",
    )


def add_exclude_flag(group: Any) -> None:
    """Add `--quantize-exclude`."""
    group.add_argument(
        "--quantize-exclude",
        default="",
        metavar="WHAT",
        help="what stays in float, by commas: numbers of this model's layers, and modules such as lm_head or\n"
        "*.mlp.down_proj",
    )


def add_output_flags(parser: argparse.ArgumentParser) -> None:
    """Add the output folder and `--overwrite`."""
    parser.add_argument("output", type=Path, help="the folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier output of this program")


def add_plan_flags(parser: argparse.ArgumentParser) -> None:
    """Add `--dry-run` and `--save-recipe`."""
    parser.add_argument("--dry-run", action="store_true", help="print the plan and what it would bring; write nothing")
    parser.add_argument(
        "--save-recipe",
        type=Path,
        metavar="FILE",
        help="write the recipe that the flags amount to, when all else is done",
    )


# The descriptions in `optimum.exporters.streamline.GRAPH_QUANTIZERS`, which would take seconds to import; a test
# compares them.
QUANTIZATION_LINES = {
    "int8": "weights and activations in 8 bits, activation scales computed at run time",
    "int8-static": "weights and activations in 8 bits, activation scales from calibration text (QDQ)",
    "int4": "weights in 4 bits, blocks of 32, rounded to nearest (MatMulNBits)",
    "int4-hqq": "weights in 4 bits, blocks of 32, offsets by half-quadratic quantization (HQQ)",
    "int4-gptq": "weights in 4 bits, blocks of 32, rounded by their effect on calibration text (GPTQ)",
}


# What the exporters' `ENGINE_QUANTIZERS` say of each; the same test.
ENGINE_QUANTIZATION_LINES = {
    "int8": "weights and activations in 8 bits, activation scales from calibration text",
    "fp8": "weights and activations in 8-bit floats, for GPUs of compute capability 8.9 or later",
    "int4": "weights in 4 bits, blocks of 64, rounded to nearest",
}


# What `optimum.streamline.quantizers.QUANTIZERS` says of each; the same test.
CHECKPOINT_QUANTIZATION_LINES = {
    "bnb-int8": "weights in 8 bits, activations too (LLM.int8, bitsandbytes)",
    "bnb-nf4": "weights in 4 bits, NormalFloat, blocks of 64 (bitsandbytes)",
    "torchao-int4": "weights in 4 bits, groups of 32 (torchao; on a CPU a byte holds one)",
}


# Repeated from `registry.METHODS`, which cannot be imported here; a test holds the two together.
METHOD_LINES = {
    "auto": "the default: blockpruner or come-p, unhealed also linear maps, by held-out loss; then heal distill",
    "average": "the same neighbours as come, their weights averaged (baseline of 2510.15304)",
    "blockpruner": "attentions and MLPs, one at a time by loss, to the weight of so many layers (2406.10594)",
    "come": "the two neighbours most alike merged by their channels, step by step (2510.15304)",
    "come-mp": "as come, healed by a distillation after each merge (2510.15304)",
    "come-p": "as come, the ratio of each merge by trying 21 of them on calibration text (2510.15304)",
    "come-sp": "as come, then healed by one distillation (2510.15304)",
    "explicit": "the layers given by --layers, such as 3,7,11-13",
    "gromov": "the block of least angular distance on last tokens, removed or replaced (2403.17887)",
    "layerchop": "layers by their place: evenly spread, or near input, output, middle or both (2305.14864)",
    "llm-streamline": "the block of highest input-output cosine, removed or replaced (2403.19135)",
    "shortened-ppl": "the layers without each of which perplexity is lowest, all at once (2402.02834)",
    "shortened-taylor": "the layers of lowest sum of |weight x gradient|, all at once (2402.02834)",
    "shortgpt": "the layers of lowest Block Influence, all at once or iteratively (2403.03853)",
    "sleb": "one layer at a time, each time the one whose loss hurts least (2402.09025)",
}
