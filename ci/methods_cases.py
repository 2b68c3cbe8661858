"""The rows of `ci/bench methods`: a `Case` is a row to measure, a `Row` is a measured one. Nothing is measured here."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

from optimum.streamline.methods.auto import CANDIDATES

MODELS = {
    "reference": Path("examples/reference_model"),
    "qwen3": Path("examples/qwen3_model"),
    "gpt2": Path("examples/gpt2_model"),
}
LAYERS = 16
# The numbers of layers to remove, a quarter and a half.
REMOVED = (4, 8)
DRAWS = 6
EVALUATION, LENGTH = 128, 256
# Part of each row's key. Change it if a change of the code makes all rows obsolete.
EDITION = 2
# The calibration text is small, because the greedy searches run the model on it hundreds of times.
COMMON: dict[str, Any] = {"calibration": "stdlib:calibration", "samples": 24, "length": LENGTH, "heal": "none"}
# The healing text is drawn from the same text. No model was trained on it, and it is not the evaluation text.
DISTILL: dict[str, Any] = {
    "heal": "distill",
    "heal_data": "stdlib:calibration",
    "heal_tokens": 200_000,
    "heal_epochs": 1,
}

# The same, on as many tokens that the original samples.
SELF: dict[str, Any] = {**DISTILL, "heal_data": "self"}

# Settings of the healing that take less memory, each of them with CoMe-P.
SETTINGS: dict[str, dict[str, Any]] = {
    "bf16, AdamW in 8 bits, micro-batches of 1": {
        "heal_dtype": "bf16",
        "heal_optimizer": "adamw-8bit",
        "heal_micro_batch": 1,
    },
    "cached outputs, top-64": {"heal_cache": "top-64"},
    "original in bf16": {"heal_original": "bf16"},
    "original in int8": {"heal_original": "int8"},
    "original in nf4": {"heal_original": "nf4"},
    "LoRA": {"lora": True},
    "LoRA on nf4": {"lora": True, "lora_base": "nf4"},
    "LoRA on nf4, original in nf4": {"lora": True, "lora_base": "nf4", "heal_original": "nf4"},
}
# Every method, without healing.
UNHEALED: dict[str, dict[str, Any]] = {
    "shortgpt": {"method": "shortgpt"},
    "shortgpt iterative": {"method": "shortgpt", "iterative": True},
    "shortgpt + linear": {"method": "shortgpt", "replacement": "linear"},
    "llm-streamline none": {"method": "llm-streamline", "replacement": "none"},
    "llm-streamline + linear": {"method": "llm-streamline", "replacement": "linear"},
    "gromov": {"method": "gromov"},
    "come": {"method": "come"},
    "come-p": {"method": "come-p"},
    "average": {"method": "average"},
    **{
        f"layerchop {pattern}": {"method": "layerchop", "pattern": pattern}
        for pattern in ("max-gap", "input", "output", "middle", "both")
    },
    "sleb": {"method": "sleb"},
    "sleb + linear": {"method": "sleb", "replacement": "linear"},
    "sleb + corrected": {"method": "sleb", "replacement": "corrected"},
    "shortened-ppl": {"method": "shortened-ppl"},
    "shortened-taylor": {"method": "shortened-taylor"},
    "shifted": {"method": "shifted"},
    "shifted + corrected": {"method": "shifted", "replacement": "corrected"},
    "blockpruner": {"method": "blockpruner"},
    "blockpruner --no-packed": {"method": "blockpruner", "packed": False},
}
# The method that is also measured with other settings of the healing, and on text that the original samples.
VARIED = "come-p"
# The methods that are also measured with distillation: those that `auto` compares on some models.
DISTILLED = tuple(CANDIDATES)
AUTO: dict[str, Any] = {"method": "auto"}
# The default method and healing, with the default of four passes: a quarter, a third and a half of the layers removed.
FOUR_PASSES = {4: "25%", 5: "33%", 8: "50%"}

Part = Literal["unhealed", "healed", "default", "settings", "self"]


@dataclass(frozen=True)
class Case:
    """One row to measure.

    Args:
        model: A key of `MODELS`.
        part: The part of the page that the row belongs to.
        removed: The number of layers to remove; 0 for the dense model.
        name: The name of the row.
        recipe: The fields of the recipe that differ from `COMMON`.
    """

    model: str
    part: Part
    removed: int
    name: str
    recipe: dict[str, Any]

    @property
    def random(self) -> bool:
        """Whether the layers to remove are drawn at random."""
        return self.name.startswith("random")

    @property
    def fields(self) -> dict[str, Any]:
        """All fields of the recipe."""
        removal = {} if self.random or not self.removed else {"remove": self.removed}
        return {**COMMON, "method": "llm-streamline", **self.recipe, **removal}

    @property
    def key(self) -> str:
        """The row's key in the results. It changes with the recipe, the evaluation text and `EDITION`."""
        definition = json.dumps([self.fields, EVALUATION, DRAWS, EDITION], sort_keys=True)
        digest = hashlib.sha256(definition.encode()).hexdigest()[:10]
        return f"{self.model}/{self.removed}/{self.name}/{digest}"

    def draws(self) -> list[tuple[int, ...]]:
        """Layers to remove, drawn at random: one tuple of layer indices per draw."""
        draw = random.Random(self.removed)
        return [tuple(sorted(draw.sample(range(LAYERS), self.removed))) for _ in range(DRAWS)]


@dataclass(frozen=True)
class Row:
    """One measured row: the fields of its `Case`, and the measurements.

    Args:
        key: The key of the case; it and the next four fields are the case's.
        model: As in `Case`.
        part: As in `Case`.
        removed: As in `Case`.
        name: As in `Case`.
        layers: What was done to the layers, in words.
        perplexity: The perplexity, and its 95% interval; for random draws their mean, lowest and highest.
        ratio: The perplexity over the dense model's, in the same form.
        parameters: The number of parameters.
        seconds: The time to choose, edit and heal, in seconds.
        peak_mib: The largest resident memory meanwhile, in MiB.
    """

    key: str
    model: str
    part: str
    removed: int
    name: str
    layers: str
    perplexity: tuple[float, float, float]
    ratio: tuple[float, float, float]
    parameters: int
    seconds: float
    peak_mib: float


def cases() -> Iterator[Case]:
    """All rows. The last are those of `auto`, which take longest."""
    for model in MODELS:
        yield from unhealed_cases(model)
    yield from settings_cases()
    for model, removed in product(MODELS, REMOVED):
        yield Case(model, "self", removed, VARIED, {**UNHEALED[VARIED], **SELF})
    for removed in REMOVED:
        for model in MODELS:
            for name in DISTILLED:
                yield Case(model, "healed", removed, name, {**UNHEALED[name], **DISTILL})
    for model, removed in product(MODELS, REMOVED):
        yield Case(model, "healed", removed, "auto", {**AUTO, **DISTILL})
    for model, removed in product(MODELS, REMOVED):
        yield Case(model, "unhealed", removed, "auto", AUTO)
    for removed, share in FOUR_PASSES.items():
        yield Case("reference", "default", removed, f"auto, {share}, 4 passes", {**AUTO, **DISTILL, "heal_epochs": 4})


def settings_cases() -> Iterator[Case]:
    """The rows of settings that take less memory: the reference model without a quarter of its layers."""
    for name, fields in SETTINGS.items():
        yield Case("reference", "settings", REMOVED[0], name, {**UNHEALED[VARIED], **DISTILL, **fields})


def unhealed_cases(model: str) -> Iterator[Case]:
    """A model's rows without healing, but for `auto`."""
    yield Case(model, "unhealed", 0, "dense", {})
    for removed in REMOVED:
        yield Case(model, "unhealed", removed, f"random, mean of {DRAWS} (range)", {})
        for name, fields in UNHEALED.items():
            yield Case(model, "unhealed", removed, name, fields)
