"""The recipe: every option of a run, in groups, as one frozen value that YAML, flags and Python all make.

A new option is one field here: its flag, help, YAML key, check and docstring follow from it. The recipe knows names
and ranges; a pruning method checks for itself what it makes of them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt

from optimum.streamline.quantization.quantizers import NONE, QUANTIZERS

from .options import CheckedOptions, DefinedOption, Option, documented, groups_of, options_of

# General text of a size that any model can be chosen, healed and judged on; its two splits share no article.
CHOOSING_TEXT = "hub:Salesforce/wikitext,wikitext-103-raw-v1,train"
JUDGING_TEXT = "hub:Salesforce/wikitext,wikitext-103-raw-v1,test"
_HUGE = 10**9
_TRAININGS = r"none|(hidden-mse|lm|distill)(\+(lm|distill))*"

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
# The replacement in a method's own paper; nothing in all others.
_PAPERS_REPLACEMENT: dict[str, Replacement] = {"llm-streamline": "layer"}
# The method for a replacement where no method is named: for a trained one `llm-streamline`, its paper's. Linear maps
# go into any gaps, and patch layers chosen apart better than a block (measured: `docs/methods.md`).
_METHOD_FOR: dict[Replacement, str] = {"none": "auto", "linear": "shortgpt"}


@documented
@dataclass(frozen=True)
class Pruning(CheckedOptions):
    """Which layers are removed, and what replaces them."""

    method: Annotated[
        str | None,
        Option(
            "How the layers are chosen.",
            default="explicit with `layers`, shortgpt with replacement linear, llm-streamline with a trained "
            "replacement, else auto",
        ),
    ] = None
    remove: Annotated[
        int | str | None,
        Option(
            "Number of layers that the model loses, such as 4, or a share of its layers, such as 25%. A replacement "
            "layer counts as kept.",
            metavar="AMOUNT",
            form="must be a number of layers or a share such as 25%",
        ),
    ] = None
    layers: Annotated[
        str | None,
        Option(
            "Layers to remove, counted from 0, such as 3,7,11-13. Give this or `remove`, not both.", commas="3,7,11-13"
        ),
    ] = None
    iterative: Annotated[bool, Option("Score the layers again after each removal. For method shortgpt.")] = False
    protect: Annotated[
        str | None,
        Option(
            "Number of first layers and of last layers that are never removed. For the methods sleb, shortened-taylor "
            "and shortened-ppl.",
            default="of sleb: 1,1; of shortened-taylor: 4,2; of shortened-ppl: 0,0",
            metavar="FIRST,LAST",
            pattern=r"0*[0-9]{1,9},0*[0-9]{1,9}",
            form="must be two numbers, how many of the first and of the last layers, such as 1,1",
        ),
    ] = None
    pattern: Annotated[
        Pattern | None, Option("Which layers are removed, by their place. For method layerchop.", default="max-gap")
    ] = None
    replacement: Annotated[
        Replacement | None,
        Option(
            "What replaces the removed layers. linear is a least-squares map, folded into the layer before. The "
            "others are trained and replace one block: layer is a decoder layer, mlp a layer without attention, ffn "
            "and swiglu have no norm and no residual and need optimum.streamline.load.",
            default="layer for llm-streamline; none or linear for auto without healing; else none",
        ),
    ] = None


@documented
@dataclass(frozen=True)
class Healing(CheckedOptions):
    """Training that repairs the pruned model."""

    trainings: Annotated[
        str | None,
        Option(
            "Trainings in order, joined by +, or none. hidden-mse trains the replacement to the output of its block, "
            "and must come first. lm trains on next-token cross-entropy. distill trains to the logits and hidden "
            "states of the original.",
            key="heal",
            default="hidden-mse with a trained replacement; distill for auto, come-sp and come-mp; lm for layerchop; "
            "else none",
            pattern=_TRAININGS,
            form="must be none, or one or more of hidden-mse (first), lm and distill, joined by +",
        ),
    ] = None
    scope: Annotated[
        Scope | None,
        Option(
            "What lm and distill train.",
            key="heal_scope",
            default="replacement for an lm that comes first, if there is a trained replacement (with `lora`, if "
            "another training follows); else model",
        ),
    ] = None
    data: Annotated[str, Option("Healing text, to train on.", key="heal_data", metavar="SPEC")] = CHOOSING_TEXT
    tokens: Annotated[
        int,
        Option("Number of tokens to train on. Each counts once, however many epochs there are.", key="heal_tokens"),
        Gt(0),
        Le(_HUGE * 1000),
    ] = 200_000
    minutes: Annotated[
        float | None,
        Option(
            "Longest time of each training, in minutes. The trainings after the merges of come-mp share it.",
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
            default="by the training, by what is trained, and by the width of the model",
        ),
        Gt(0),
    ] = None
    epochs: Annotated[int, Option("Passes over the training tokens.", key="heal_epochs"), Gt(0)] = 4
    batch: Annotated[
        int,
        Option("Windows in one update, over all processes. Must be a multiple of their number.", key="heal_batch"),
        Gt(0),
        Le(_HUGE),
    ] = 4
    normalised: Annotated[
        bool, Option("In hidden-mse, divide the error of each token by its squared norm.", key="heal_normalised")
    ] = False
    kl: Annotated[
        float | None,
        Option(
            "In distill, share of the KL divergence to the logits of the original. The rest is cross-entropy.",
            key="heal_kl",
            default="1",
        ),
        Ge(0),
        Le(1),
    ] = None
    hidden: Annotated[
        float | None,
        Option("In distill, weight of the error of the hidden states of each layer.", key="heal_hidden", default="10"),
        Ge(0),
    ] = None
    lora: Annotated[
        bool,
        Option("In lm and distill, train low-rank adapters instead of the weights. They are merged before saving."),
    ] = False
    lora_rank: Annotated[int, Option("Rank of the adapters."), Gt(0), Le(_HUGE)] = 16


@documented
@dataclass(frozen=True)
class Calibration(CheckedOptions):
    """Text that the layers are scored and chosen on. Method auto reads more of it, to compare plans."""

    data: Annotated[str, Option("Calibration text.", key="calibration", metavar="SPEC")] = CHOOSING_TEXT
    samples: Annotated[int, Option("Number of windows of calibration text."), Gt(0), Le(_HUGE)] = 128


@documented
@dataclass(frozen=True)
class Quantization(CheckedOptions):
    """How the result is quantized: the checkpoint, by bitsandbytes or torchao, or its ONNX export."""

    quantizer: Annotated[str, Option("Name of the quantizer.", key="quantize")] = NONE
    exclude: Annotated[
        str | None,
        Option(
            "What stays in float, by commas: numbers of layers of the original, and modules such as lm_head or "
            "*.mlp.down_proj.",
            key="quantize_exclude",
            metavar="WHAT",
            commas="0,*.mlp.down_proj",
        ),
    ] = None
    steps: Annotated[
        Steps | None,
        Option(
            "Order of the two. With quantize,prune the layers are chosen in the quantized model, and can only be "
            "removed whole.",
            default="prune,quantize",
            commas="quantize,prune",
        ),
    ] = None


@documented
@dataclass(frozen=True)
class Export(CheckedOptions):
    """What the checkpoint is exported to."""

    format: Annotated[Format, Option("Format of the export.")] = "none"


@documented
@dataclass(frozen=True)
class Evaluation(CheckedOptions):
    """How the candidate is compared with the original."""

    data: Annotated[str, Option("Evaluation text.", key="eval_data", metavar="SPEC")] = JUDGING_TEXT
    samples: Annotated[int, Option("Number of windows of evaluation text.", key="eval_samples"), Gt(1), Le(_HUGE)] = 64
    judge: Annotated[
        Judge,
        Option("What must keep each limit of the budget: bound, the whole interval of a figure; point, the figure."),
    ] = "bound"


@documented
@dataclass(frozen=True)
class Budget(CheckedOptions):
    """Limits that the candidate must keep; a limit that is left out is not judged."""

    max_ppl_ratio: Annotated[
        float | None, Option("Largest perplexity of the candidate, divided by the original's."), Gt(0)
    ] = None
    max_kl: Annotated[float | None, Option("Largest mean KL(original || candidate), in nats per token."), Ge(0)] = None
    min_speedup: Annotated[
        float | None,
        Option("Least decode speed-up: time per token of the original, divided by the candidate's, in one runtime."),
        Gt(0),
    ] = None
    max_size_ratio: Annotated[
        float | None,
        Option("Largest size on disk of the candidate, divided by the original's, in one runtime."),
        Gt(0),
    ] = None


@documented
@dataclass(frozen=True)
class Recipe(CheckedOptions):
    """One run, from text to verdict.

    `parsing.make_recipe` makes one from the keys of YAML or Python. An option's key is its name in its group, or the
    name of its flag with underscores.
    """

    pruning: Pruning = field(default_factory=Pruning)
    healing: Healing = field(default_factory=Healing)
    calibration: Calibration = field(default_factory=Calibration)
    quantization: Quantization = field(default_factory=Quantization)
    export: Export = field(default_factory=Export)
    evaluation: Evaluation = field(default_factory=Evaluation)
    budget: Budget = field(default_factory=Budget)
    length: Annotated[int, Option("Tokens in one window of text."), Gt(7), Le(_HUGE)] = 512
    dtype: Annotated[
        Dtype | None,
        Option(
            "Number type that weights are stored in, or that `validate` computes in.",
            default="the original's for a checkpoint, fp32 for an export and for `validate`",
        ),
    ] = None
    device: Annotated[Device, Option("Device that the model runs on.")] = "cpu"
    seed: Annotated[int, Option("Seed of everything random."), Ge(0), Lt(2**63)] = 0

    @property
    def resolved_replacement(self) -> Replacement:
        """The replacement; where it is left out, that of the method's paper."""
        return self.pruning.replacement or _PAPERS_REPLACEMENT.get(self.pruning.method or "", "none")

    @property
    def resolved_method(self) -> str:
        """The method; where it is left out, the one that follows from the layers and the replacement."""
        if self.pruning.method is not None:
            return self.pruning.method
        if self.pruning.layers is not None:
            return "explicit"
        return _METHOD_FOR.get(self.resolved_replacement, "llm-streamline")

    @property
    def resolved_trainings(self) -> tuple[str, ...]:
        """The trainings, in order; where they are left out, those of the replacement or of the method's paper.

        A replacement layer that nothing trains would be worse than none, so it is trained by default.
        """
        given = self.healing.trainings
        if given is not None:
            return () if given == "none" else tuple(given.split("+"))
        if self.resolved_replacement in ("layer", "mlp", "ffn", "swiglu"):
            return ("hidden-mse",)
        default = _PAPERS_HEALING.get(self.resolved_method)
        return () if default is None else (default,)

    @property
    def quantize_first(self) -> bool:
        """Whether layers are chosen in, and taken from, the quantized model."""
        return self.quantization.steps == "quantize,prune"

    @property
    def excluded(self) -> list[str]:
        """The layers and modules that quantization leaves in float."""
        return [each.strip() for each in (self.quantization.exclude or "").split(",") if each.strip()]

    def option(self, key: str) -> Any:
        """The value of an option, by the name of its flag with underscores, such as `heal_tokens`."""
        return self._value(OPTIONS[key])

    def with_options(self, **options: Any) -> Recipe:
        """The same recipe with other options, by the names of their flags with underscores."""
        own: dict[str, Any] = {}
        grouped: dict[str, dict[str, Any]] = {}
        for key, value in options.items():
            defined = OPTIONS[key]
            (grouped.setdefault(defined.group, {}) if defined.group else own)[defined.name] = value
        own |= {name: dataclasses.replace(getattr(self, name), **changes) for name, changes in grouped.items()}
        return dataclasses.replace(self, **own)

    def told_options(self) -> dict[str, Any]:
        """The options that differ from their defaults, and the text that is used in any case.

        The keys are the names of the flags, with underscores.
        """
        told = {"calibration", "eval_data", *(["heal_data"] if self.resolved_trainings else [])}
        values = {key: self._value(defined) for key, defined in OPTIONS.items()}
        return {key: value for key, value in values.items() if value != OPTIONS[key].default or key in told}

    def to_dict(self) -> dict[str, Any]:
        """The same options in their groups, as YAML has them."""
        fields: dict[str, Any] = {}
        for key, value in self.told_options().items():
            defined = OPTIONS[key]
            (fields.setdefault(defined.group, {}) if defined.group else fields)[defined.name] = value
        return fields

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what decides the checkpoint: all but the export, the evaluation and the budget."""
        apart = ("export", "evaluation", "budget")
        fields = {key: self._value(defined) for key, defined in OPTIONS.items() if defined.group not in apart}
        if self.quantization.quantizer not in QUANTIZERS and not self.quantize_first:  # the export is quantized
            for key in ("quantize", "quantize_exclude"):
                del fields[key]
        fields["steps"] = self.quantize_first
        # What is spelled out and what follows are one: `remove: 4` and `--remove 4`, a method named or left out.
        pattern = (self.pruning.pattern or "max-gap") if self.resolved_method == "layerchop" else None
        fields |= {"method": self.resolved_method, "pattern": pattern, "heal": list(self.resolved_trainings)}
        # `auto` with nothing trained may choose linear maps where nothing is spelled out.
        open_choice = self.resolved_method == "auto" and not self.resolved_trainings
        fields["replacement"] = self.pruning.replacement if open_choice else self.resolved_replacement
        fields["remove"] = str(self.pruning.remove)
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()

    def _value(self, defined: DefinedOption) -> Any:
        return getattr(getattr(self, defined.group) if defined.group else self, defined.name)


OPTIONS: dict[str, DefinedOption] = {each.key: each for each in options_of(Recipe)}
"""Every option, by the name of its flag with underscores."""
GROUPS: dict[str, type[CheckedOptions]] = groups_of(Recipe)
"""The groups, by their field of the recipe."""
