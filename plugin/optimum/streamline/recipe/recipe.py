"""The recipe: everything that decides a run, as one frozen value that YAML, flags and Python all make.

Knows names and ranges. What a method makes of them is the method's own `check`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from optimum.streamline.quantization.quantizers import NONE, QUANTIZERS

# General text of a size that any model can be chosen, healed and judged on; its two splits share no article.
CHOOSING_TEXT = "hub:Salesforce/wikitext,wikitext-103-raw-v1,train"
JUDGING_TEXT = "hub:Salesforce/wikitext,wikitext-103-raw-v1,test"
# A value is of its field's type already: `"16"`, `16.0` and `true` are no integers.
_STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
_HUGE = 10**9


_HEAL = r"^(none|(hidden-mse|lm|distill)(\+(lm|distill))*)$"


# How a method's own paper repairs the model afterwards; `auto` does what was measured to be best.
_PAPERS_HEALING = {"auto": "distill", "layerchop": "lm", "come-sp": "distill", "come-mp": "distill"}

Replacement = Literal["none", "layer", "mlp", "ffn", "swiglu", "linear"]
Pattern = Literal["max-gap", "input", "output", "middle", "both"]
Scope = Literal["replacement", "model"]
Dtype = Literal["fp32", "fp16", "bf16"]
Device = Literal["cpu", "cuda"]
Format = Literal["none", "onnx"]
Steps = Literal["prune,quantize", "quantize,prune"]
Judge = Literal["bound", "point"]
# What stands in for the layers that a method takes, in its own paper; nothing in all others.
_PAPERS_REPLACEMENT: dict[str, Replacement] = {"llm-streamline": "layer"}
# What chooses the layers for a replacement where no method is named: for a trained one `llm-streamline`, its paper's.
# Linear maps go into any gaps, and patch layers chosen apart better than a block (measured: `docs/methods.md`).
_METHOD_FOR: dict[Replacement, str] = {"none": "auto", "linear": "shortgpt"}


@dataclass(frozen=True, config=_STRICT)
class Budget:
    """What a candidate may cost, and must bring; a limit left out is not judged.

    Args:
        max_ppl_ratio: Perplexity of the candidate over the original's.
        max_kl: Mean KL(original || candidate), nats per token.
        min_speedup: Decode time per token of the original over the candidate's, in one runtime.
        max_size_ratio: Bytes on disk of the candidate over the original's, in one runtime.
    """

    max_ppl_ratio: float | None = Field(default=None, gt=0)
    max_kl: float | None = Field(default=None, ge=0)
    min_speedup: float | None = Field(default=None, gt=0)
    max_size_ratio: float | None = Field(default=None, gt=0)


@dataclass(frozen=True, config=_STRICT)
class Recipe:
    """One run, from text to verdict. Field names are the YAML keys and, with dashes, the flags.

    Args:
        method: How layers are chosen: a name in `registry.METHODS`. Left out, it follows from the rest: `explicit`
            with `layers`, `shortgpt` with the replacement `linear`, `llm-streamline` with a trained one, else `auto`.
        remove: Net number of layers to lose, or a share of them such as `25%`.
        layers: The layers to take out, by number in the original, instead of `remove`: `3,7,11-13`.
        iterative: Score anew after each removal (ShortGPT).
        protect: How many of the first and of the last layers are never removed, as `1,1` (SLEB, Shortened-LLaMA).
        pattern: Which layers LayerChop takes.
        replacement: What stands in for a removed block; left out, a trained layer for `llm-streamline`, what it
            finds best for `auto` with nothing trained (nothing, or linear maps), else nothing.
        heal: Trainings in order, joined by `+`: `hidden-mse` (the replacement alone, to the block's output), `lm`
            (cross-entropy), `distill` (to the original's logits and hidden states).
        heal_scope: What `lm` and `distill` train: the replacement, or the whole model; left out, the replacement for
            an `lm` that comes first, where there is a trained one (with `lora`: if a training follows), else the model.
        heal_tokens: Tokens to train on, each counted once.
        heal_minutes: Longest time of each training, which ends at whichever of the two comes first; those after
            `come-mp`'s merges share it.
        heal_lr: Peak learning rate; left out, that of `healing.settings` for what is trained, to what, and the width.
        heal_epochs: Passes over these tokens.
        heal_batch: Windows an update, over all processes.
        heal_normalised: Divide `hidden-mse`'s error by each token's squared norm.
        heal_kl: Share of the KL to the original's logits in `distill`; the rest is cross-entropy. Left out, 1.
        heal_hidden: Weight in `distill` of the error of each layer's hidden states to those it stands for. Left out,
            10, the same for every method.
        lora: Train low-rank adapters (merged before saving) instead of the weights, in `lm` and `distill`.
        lora_rank: Their rank.
        calibration: Text SPEC for the choices.
        heal_data: Text SPEC for the training.
        eval_data: Text SPEC for the judgement.
        samples: Calibration windows; `auto` reads some more, to compare plans on.
        eval_samples: Evaluation windows.
        length: Tokens a window, for all three.
        dtype: What the result is stored in: the original's own for a checkpoint, fp32 for an export, by default.
        device: Where it is computed.
        quantize: How the result is quantized: a key of `quantizers.QUANTIZERS`, or for the ONNX export a key of the
            exporters' `GRAPH_QUANTIZERS`.
        quantize_exclude: What stays in float, by commas: numbers of layers, in the original, and names of modules.
        steps: In which order; left out, `prune,quantize`.
        format: What the checkpoint is exported to.
        seed: Of everything random.
        budget: What the candidate is judged by.
        judge: What must be within each limit: `bound`, the whole interval of the figure, or `point`, the figure.
    """

    method: str | None = None
    remove: int | str | None = None
    layers: str | None = None
    iterative: bool = False
    protect: str | None = Field(default=None, pattern=r"^0*[0-9]{1,9},0*[0-9]{1,9}$")
    pattern: Pattern | None = None
    replacement: Replacement | None = None
    heal: str | None = Field(default=None, pattern=_HEAL)
    heal_scope: Scope | None = None
    heal_tokens: int = Field(default=200_000, gt=0, le=_HUGE * 1000)
    heal_minutes: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    heal_lr: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    heal_epochs: int = Field(default=4, gt=0)
    heal_batch: int = Field(default=4, gt=0, le=_HUGE)
    heal_normalised: bool = False
    heal_kl: float | None = Field(default=None, ge=0, le=1)
    heal_hidden: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    lora: bool = False
    lora_rank: int = Field(default=16, gt=0, le=_HUGE)
    calibration: str = CHOOSING_TEXT
    heal_data: str = CHOOSING_TEXT
    eval_data: str = JUDGING_TEXT
    samples: int = Field(default=128, gt=0, le=_HUGE)
    eval_samples: int = Field(default=64, gt=1, le=_HUGE)
    length: int = Field(default=512, gt=7, le=_HUGE)
    dtype: Dtype | None = None
    device: Device = "cpu"
    quantize: str = NONE
    quantize_exclude: str | None = None
    steps: Steps | None = None
    format: Format = "none"
    seed: int = Field(default=0, ge=0, lt=2**63)
    budget: Budget = Field(default_factory=Budget)
    judge: Judge = "bound"

    @property
    def stand_in(self) -> Replacement:
        """The replacement; left out, that of the method's paper."""
        return self.replacement or _PAPERS_REPLACEMENT.get(self.method or "", "none")

    @property
    def method_name(self) -> str:
        """The method, where it was left out the one that follows from the rest."""
        if self.method is not None:
            return self.method
        if self.layers is not None:
            return "explicit"
        return _METHOD_FOR.get(self.stand_in, "llm-streamline")

    @property
    def quantize_first(self) -> bool:
        """Whether layers are chosen in, and taken from, the quantized model."""
        return self.steps == "quantize,prune"

    @property
    def excluded(self) -> list[str]:
        """What `quantize_exclude` names."""
        return [each.strip() for each in (self.quantize_exclude or "").split(",") if each.strip()]

    @property
    def healing(self) -> tuple[str, ...]:
        """The trainings, in order; left out, what `_PAPERS_HEALING` says of the method.

        A replacement layer that nothing trains would be worse than none, so it is trained by default.
        """
        if self.heal is not None:
            return () if self.heal == "none" else tuple(self.heal.split("+"))
        if self.stand_in in ("layer", "mlp", "ffn", "swiglu"):
            return ("hidden-mse",)
        default = _PAPERS_HEALING.get(self.method_name)
        return () if default is None else (default,)

    def to_dict(self) -> dict[str, Any]:
        """The fields that differ from their defaults, and what text is used in any case, as YAML would have them."""
        fields = dataclasses.asdict(self)
        defaults = dataclasses.asdict(Recipe())
        fields["budget"] = {key: value for key, value in fields["budget"].items() if value is not None}
        defaults["budget"] = {}
        told = {"calibration", "eval_data", *(["heal_data"] if self.healing else [])}
        return {key: value for key, value in fields.items() if value != defaults[key] or key in told}

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what decides the checkpoint: all but the judgement of it."""
        fields = dataclasses.asdict(self)
        for judgement in ("budget", "judge", "eval_data", "eval_samples", "format"):
            del fields[judgement]
        if self.quantize not in QUANTIZERS and not self.quantize_first:  # it is the export that is quantized
            for field in ("quantize", "quantize_exclude"):
                del fields[field]
        fields["steps"] = self.quantize_first
        # What is spelled out and what follows are one: `remove: 4` and `--remove 4`, a method named or left out.
        pattern = (self.pattern or "max-gap") if self.method_name == "layerchop" else None
        fields |= {"method": self.method_name, "pattern": pattern, "heal": list(self.healing)}
        # `auto` with nothing trained may choose linear maps where nothing is spelled out.
        open_choice = self.method_name == "auto" and not self.healing
        fields["replacement"] = self.replacement if open_choice else self.stand_in
        fields["remove"] = str(self.remove)
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
