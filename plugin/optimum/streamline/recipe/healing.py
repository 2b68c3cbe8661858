"""The group of the recipe for healing: the training that repairs the pruned model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le

from .options import HUGE, CheckedOptions, Option, documented

CHOOSING_TEXT = "hub:Salesforce/wikitext,wikitext-103-raw-v1,train"
"""The default text for scoring and healing: general text, and large enough."""
REPLACED = 0.2
"""The default share of tokens that later passes of `distill` replace (measured: `docs/methods.md`)."""
KL_WITH_REPLACED = 0.7
"""The weight of the KL divergence in a long `distill` that replaces tokens (measured: `docs/methods.md`)."""
MUCH = 800_000
"""The number of tokens, over all passes, from which a training is long: the default number of tokens and passes."""
_CACHES = r"none|full|(top|sample)-[1-9][0-9]{0,5}"
_TRAININGS = r"none|(hidden-mse|local|lm|distill)(\+(lm|distill))*"

Scope = Literal["replacement", "model"]
HealDtype = Literal["fp32", "bf16"]
Optimizer = Literal["adamw", "adamw-8bit"]
Form = Literal["fp32", "bf16", "int8", "nf4"]


@documented
@dataclass(frozen=True)
class Healing(CheckedOptions):
    """Training that repairs the pruned model."""

    trainings: Annotated[
        str | None,
        Option(
            "Trainings in order, joined by +, or none. hidden-mse trains the replacement to give the output of the "
            "block that it replaces; local trains each layer that lost a neighbour to give its output in the original; "
            "either must come first. lm trains with next-token cross-entropy. distill trains the model to give the "
            "logits and hidden states of the original.",
            key="heal",
            default="hidden-mse with a trained replacement; distill for auto, come-sp and come-mp; lm for layerchop; "
            "else none",
            pattern=_TRAININGS,
            form="must be none, or one or more of hidden-mse or local (first), lm and distill, joined by +",
        ),
    ] = None
    scope: Annotated[
        Scope | None,
        Option(
            "What lm and distill train.",
            key="heal_scope",
            default="model; but replacement for lm as the first training with a trained replacement, unless it is the "
            "only training and `lora` is set",
        ),
    ] = None
    data: Annotated[
        str,
        Option(
            "Healing text, to train on. Also self[:PROMPTS], text that the original samples: from the first tokens of "
            "passages of the calibration text, or from the prompts in a file, which has one prompt in a line or is a "
            "table.",
            key="heal_data",
            metavar="SPEC",
        ),
    ] = CHOOSING_TEXT
    tokens: Annotated[
        int,
        Option("Number of different tokens to train on. Epochs do not count.", key="heal_tokens"),
        Gt(0),
        Le(HUGE * 1000),
    ] = 200_000
    minutes: Annotated[
        float | None,
        Option(
            "Time limit of each training, in minutes. The trainings of come-mp, one after each merge, share one limit, "
            "and so do the layers of local. The trial trainings of auto come on top, up to a third of it.",
            key="heal_minutes",
            default="no limit",
        ),
        Gt(0),
    ] = None
    lr: Annotated[
        float | None,
        Option(
            "Peak learning rate.",
            key="heal_lr",
            default="depends on the training, on the size of the weights, and on the hidden size",
        ),
        Gt(0),
    ] = None
    epochs: Annotated[int, Option("Number of passes over the training tokens.", key="heal_epochs"), Gt(0)] = 4
    batch: Annotated[
        int | None,
        Option(
            "Number of windows in one update, over all processes. Must be a multiple of the number of processes.",
            key="heal_batch",
            default="2 for distill, else 4; more if there are more processes",
        ),
        Gt(0),
        Le(HUGE),
    ] = None
    micro_batch: Annotated[
        int | None,
        Option(
            "Most windows that a process computes at a time in a training. Fewer take less memory. The gradients of an "
            "update are added up.",
            key="heal_micro_batch",
            default="all windows of an update",
        ),
        Gt(0),
        Le(HUGE),
    ] = None
    gradient_checkpointing: Annotated[
        bool,
        Option(
            "In lm and distill, keep only the input of each layer for the gradient, and compute the layer again. This "
            "takes less memory and more time, and gives the same weights."
        ),
    ] = False
    dtype: Annotated[
        HealDtype,
        Option(
            "Number type of the arithmetic in trainings. bf16 is mixed precision: matrix products in bf16, weights, "
            "losses and updates in fp32.",
            key="heal_dtype",
        ),
    ] = "fp32"
    optimizer: Annotated[
        Optimizer,
        Option(
            "Optimizer of trainings. adamw-8bit keeps the moments of AdamW in 8 bits; it needs torchao.",
            key="heal_optimizer",
        ),
    ] = "adamw"
    normalised: Annotated[
        bool, Option("In hidden-mse, divide the error of each token by its squared norm.", key="heal_normalised")
    ] = False
    kl: Annotated[
        float | None,
        Option(
            "In distill, weight of the KL divergence to the logits of the original, from 0 to 1. Next-token "
            "cross-entropy has the rest of the weight.",
            key="heal_kl",
            default=f"{KL_WITH_REPLACED} if later passes replace tokens, and all have {MUCH:,} tokens or more; else 1",
        ),
        Ge(0),
        Le(1),
    ] = None
    replace: Annotated[
        float | None,
        Option(
            "In distill, share of the tokens that passes after the first replace by others, which the original draws. "
            "So the model cannot learn the text by heart.",
            key="heal_replace",
            default=f"{REPLACED}; but 0 if `heal_cache` keeps outputs, because they are those on the text itself",
        ),
        Ge(0),
        Le(1),
    ] = None
    hidden: Annotated[
        float | None,
        Option("In distill, weight of the error of the hidden states of each layer.", key="heal_hidden", default="10"),
        Ge(0),
    ] = None
    cache: Annotated[
        str | None,
        Option(
            "What distill keeps on disk of the outputs of the original while it trains, so that the original runs on "
            "each window once: none, full (all logits), top-K (the K most probable tokens, and all others as one), or "
            "sample-K (K tokens drawn by their probability). Hidden states are kept with all but none.",
            key="heal_cache",
            default="full if that takes at most 4 GiB and the text is read more than once, else none",
            pattern=_CACHES,
            form="must be none, full, top-K or sample-K, such as top-64",
        ),
    ] = None
    original: Annotated[
        Form,
        Option(
            "How distill keeps the original meanwhile: in fp32, in bf16, or with the matrices of its layers in 8 bits "
            "(int8) or 4 bits (nf4), by bitsandbytes, and all else in bf16.",
            key="heal_original",
        ),
    ] = "fp32"
    lora: Annotated[
        bool,
        Option("In lm and distill, train low-rank adapters instead of the weights. They are merged before saving."),
    ] = False
    lora_base: Annotated[
        Form,
        Option(
            "How the weights that lora does not train are kept meanwhile: in fp32, or as a copy in bf16, or with the "
            "matrices of the layers in 8 bits (int8) or 4 bits (nf4), by bitsandbytes. The weights themselves stay on "
            "disk then, and the adapters are added to them."
        ),
    ] = "fp32"
    lora_rank: Annotated[int, Option("Rank of the low-rank adapters."), Gt(0), Le(HUGE)] = 16
