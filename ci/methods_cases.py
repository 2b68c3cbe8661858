"""The rows of `ci/bench methods`: a `Case` is a row to measure, a `Row` is a measured one. Nothing is measured here."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

MODELS = {
    "reference": Path("examples/reference_model"),
    "qwen3": Path(".cache/models/qwen3"),
    "gpt2": Path(".cache/models/gpt2"),
}
LAYERS = 16
# The numbers of layers to remove: 12.5, 25, 37.5 and 50% of the layers. Healing is measured at 25 and 50%.
REMOVED, HEALED = (2, 4, 6, 8), (4, 8)
DRAWS = 6
EVALUATION, LENGTH = 128, 256
SEEDS = (0, 1, 2)
# The calibration text is small, because the greedy searches run the model on it hundreds of times.
COMMON: dict[str, Any] = {"calibration": "stdlib:calibration", "samples": 24, "length": LENGTH}
# The healing text begins with the calibration text. No model was trained on it, and it is not the evaluation text.
HEAL: dict[str, Any] = {"heal_data": "stdlib:calibration", "heal_tokens": 200_000, "heal_epochs": 1, "heal_batch": 4}
LM = {**HEAL, "heal": "lm"}
DISTILL = {**HEAL, "heal": "distill", "heal_kl": 1.0, "heal_hidden": 10.0}

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
    "shortened-ppl": {"method": "shortened-ppl"},
    "shortened-taylor": {"method": "shortened-taylor"},
    "blockpruner": {"method": "blockpruner", "packed": False},
    "auto": {"method": "auto"},
}

# The methods that are also measured with distillation. They include the best and the worst pattern of LayerChop's
# paper, and one linear map. Gromov is left out: it chooses the same layers as llm-streamline at every share.
DISTILLED = (
    "shortgpt",
    "llm-streamline none",
    "come",
    "layerchop max-gap",
    "blockpruner",
    "sleb",
    "come-p",
    "average",
    "layerchop output",
    "shortgpt iterative",
    "shortgpt + linear",
    "shortened-ppl",
    "shortened-taylor",
)
# Candidates of `auto` that are distilled on the other models too.
CANDIDATES = ("blockpruner", "come-p", "sleb + linear", "shortgpt + linear")
# Each paper's own healing. CoMe's, CoMe-sp, is the row "come: distill".
OWN_HEALING: dict[str, dict[str, Any]] = {
    "llm-streamline layer: hidden-mse": {"replacement": "layer", **HEAL, "heal": "hidden-mse"},
    "llm-streamline layer: lm on it": {"replacement": "layer", **LM},
    "llm-streamline layer: hidden-mse + lora": {"replacement": "layer", **HEAL, "heal": "hidden-mse+lm", "lora": True},
    "llm-streamline mlp: hidden-mse": {"replacement": "mlp", **HEAL, "heal": "hidden-mse"},
    "llm-streamline mlp: lm on it": {"replacement": "mlp", **LM},
    "llm-streamline ffn: hidden-mse": {"replacement": "ffn", **HEAL, "heal": "hidden-mse"},
    "llm-streamline swiglu: hidden-mse": {"replacement": "swiglu", **HEAL, "heal": "hidden-mse"},
    "llm-streamline layer: hidden-mse + distill": {"replacement": "layer", **DISTILL, "heal": "hidden-mse+distill"},
    "come-mp": {"method": "come-mp", **DISTILL},
    "layerchop max-gap: lm": {"method": "layerchop", **LM},
    "shortgpt: lm": {"method": "shortgpt", **LM},
    "sleb: lm": {"method": "sleb", **LM},
}
# Healings with the same time limit; LayerChop's paper compares the first two.
SECONDS: dict[str, Any] = {"method": "layerchop", "heal_epochs": 8, "heal_minutes": 1.5}
EQUAL_SECONDS: dict[str, dict[str, Any]] = {
    "layerchop max-gap: lm, 90 s": {**LM, **SECONDS},
    "layerchop max-gap: half distill, 90 s": {**DISTILL, **SECONDS, "heal_kl": 0.5},
    "layerchop max-gap: distill, 90 s": {**DISTILL, **SECONDS},
}
# Settings of distillation, measured on CoMe-sp with four layers removed: first the learning rate, then the weight of
# the hidden-state loss, the share of the KL loss, the windows per update, and the passes over the text.
SWEPT_FROM = {**DISTILL, "heal_lr": 2e-3, "heal_kl": 1.0, "heal_batch": 8}
SWEEP: dict[str, dict[str, Any]] = {
    **{f"rate {rate:g}, hidden 1": {"heal_lr": rate, "heal_hidden": 1.0} for rate in (5e-4, 1e-3, 2e-3, 4e-3)},
    **{f"rate 0.002, hidden {weight:g}": {"heal_hidden": weight} for weight in (0.0, 0.1, 10.0, 100.0)},
    "rate 0.002, hidden 10, half cross-entropy": {"heal_kl": 0.5},
    "rate 0.002, hidden 10, nine tenths cross-entropy": {"heal_kl": 0.1},
    "rate 0.002, hidden 10, 4 windows an update": {"heal_batch": 4},
    "rate 0.002, hidden 10, 2 passes": {"heal_epochs": 2},
    "rate 0.002, hidden 10, 2 passes of stdlib:train": {"heal_epochs": 2, "heal_data": "stdlib:train"},
    "rate 0.002, hidden 10, 2 passes, 4 windows an update": {"heal_epochs": 2, "heal_batch": 4},
    "rate 0.002, hidden 10, 4 passes, 4 windows an update": {"heal_epochs": 4, "heal_batch": 4},
}
# Learning rates of fine-tuning all weights on the next-token loss, measured on LayerChop, whose own healing this is.
LM_RATES = (1.5e-4, 3e-4, 6e-4, 1.7e-3)
# The same for fine-tuning the replacement alone.
LM_RATES_ON_IT = (3e-4, 1e-3, 3e-3, 6.4e-3)
# The default method and healing with the default of four passes; a quarter, a third and a half of the layers removed.
FOUR_PASSES = {4: "25%", 5: "33%", 8: "50%"}
# The four best healed methods, by the product of their two ratios with the first seed; measured with every seed.
BEST: tuple[str, ...] = (
    "blockpruner: distill",
    "come-p: distill",
    "come: distill",
    "shortgpt iterative: distill",
)


@dataclass(frozen=True)
class Case:
    """One row to measure.

    Args:
        model: A key of `MODELS`.
        part: The part of the page that the row belongs to.
        removed: The number of layers to remove; 0 for the dense model.
        name: The name of the row.
        recipe: The fields of the recipe that differ from `COMMON`.
        seed: The seed of the recipe.
    """

    model: str
    part: Literal["unhealed", "sweep", "default", "healed", "seeds"]
    removed: int
    name: str
    recipe: dict[str, Any]
    seed: int = 0

    @property
    def random(self) -> bool:
        """Whether the layers to remove are drawn at random."""
        return self.name.startswith("random")

    @property
    def dense(self) -> bool:
        """Whether no layer is removed."""
        return self.removed == 0

    @property
    def fields(self) -> dict[str, Any]:
        """All fields of the recipe."""
        removal = {} if self.random or self.dense else {"remove": self.removed}
        return {**COMMON, "method": "llm-streamline", **self.recipe, **removal, "seed": self.seed}

    @property
    def key(self) -> str:
        """The row's key in the results. It changes with the recipe and the evaluation text, but not with the code."""
        definition = json.dumps([self.fields, EVALUATION, DRAWS], sort_keys=True)
        digest = hashlib.sha256(definition.encode()).hexdigest()[:10]
        return f"{self.model}/{self.removed}/{self.name}/{self.seed}/{digest}"

    def draws(self) -> list[tuple[int, ...]]:
        """Layers to remove, drawn at random: one tuple of layer indices per draw."""
        draw = random.Random(self.removed)
        return [tuple(sorted(draw.sample(range(LAYERS), self.removed))) for _ in range(DRAWS)]


@dataclass(frozen=True)
class Row:
    """One measured row: the fields of its `Case`, and the measurements.

    Args:
        key: The key of the case; it and the next five fields are the case's.
        model: As in `Case`.
        part: As in `Case`.
        removed: As in `Case`.
        name: As in `Case`.
        seed: As in `Case`.
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
    seed: int
    layers: str
    perplexity: tuple[float, float, float]
    ratio: tuple[float, float, float]
    parameters: int
    seconds: float
    peak_mib: float


def cases() -> Iterator[Case]:
    """All rows, the cheap ones first, so that an interrupted run has measured as many as possible."""
    for model in MODELS:
        yield Case(model, "unhealed", 0, "dense", {"heal": "none"})
        for removed in REMOVED:
            yield Case(model, "unhealed", removed, f"random, mean of {DRAWS} (range)", {})
            for name, fields in UNHEALED.items():
                yield Case(model, "unhealed", removed, name, {**fields, "heal": "none"})
    yield from sweep_cases()
    for removed, share in FOUR_PASSES.items():
        fields = {"method": "auto", **DISTILL, "heal_epochs": 4}
        yield Case("reference", "default", removed, f"auto, {share}, 4 passes", fields)
    yield from healed_cases(SEEDS[0], "healed", None)
    for model in MODELS:
        for removed in HEALED if model != "reference" else ():
            for name in CANDIDATES:
                yield Case(model, "healed", removed, f"{name}: distill", {**UNHEALED[name], **DISTILL})
    for seed in SEEDS[1:]:
        yield from healed_cases(seed, "seeds", BEST)


def sweep_cases() -> Iterator[Case]:
    """The rows that compare settings of healing."""
    for name, fields in SWEEP.items():
        yield Case("reference", "sweep", HEALED[0], name, {"method": "come-sp", **SWEPT_FROM, **fields})
    for rate in LM_RATES:
        name = f"layerchop max-gap: lm, rate {rate:g}"
        yield Case("reference", "sweep", HEALED[0], name, {"method": "layerchop", **LM, "heal_lr": rate})
    for rate in LM_RATES_ON_IT:
        name = f"llm-streamline layer: lm on it, rate {rate:g}"
        yield Case("reference", "sweep", HEALED[0], name, {"replacement": "layer", **LM, "heal_lr": rate})


def healed_cases(seed: int, part: Literal["healed", "seeds"], names: tuple[str, ...] | None) -> Iterator[Case]:
    """The healed rows of one seed.

    Args:
        seed: The seed.
        part: The part of the page.
        names: The names of the rows; `None` for all.
    """
    rows = {f"{name}: distill": {**UNHEALED[name], **DISTILL} for name in DISTILLED} | OWN_HEALING
    if names is None:
        yield Case("reference", part, 0, "dense: lm", LM, seed)
    for removed in HEALED:
        for name, fields in rows.items():
            if names is None or name in names:
                yield Case("reference", part, removed, name, fields, seed)
    for name, fields in EQUAL_SECONDS.items() if names is None else ():
        yield Case("reference", part, HEALED[0], name, fields, seed)
