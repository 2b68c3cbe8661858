"""The recipe: every option of a run, in groups, as one frozen object that is made from YAML, flags or Python.

To add an option, add one field here: its flag, help, YAML key, check and docstring follow from it. The recipe checks
types and ranges. Whether the options fit each other and the model, the pruning method and other rooms check later.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt

from optimum.streamline.quantization.quantizers import NONE, QUANTIZERS
from optimum.streamline.system.distributed import process_count

from .healing import CHOOSING_TEXT, KL_WITH_REPLACED, MUCH, REPLACED, Healing
from .options import HUGE, CheckedOptions, DefinedOption, Option, documented, groups_of, options_of

# General text, as `CHOOSING_TEXT`. The splits share no article.
JUDGING_TEXT = "hub:Salesforce/wikitext,wikitext-103-raw-v1,test"

# The healing in the paper of each method. For `auto`, the healing that was measured to be best.
_PAPERS_HEALING = {"auto": "distill", "layerchop": "lm", "come-sp": "distill", "come-mp": "distill"}

Replacement = Literal["none", "layer", "mlp", "ffn", "swiglu", "linear", "corrected"]
Pattern = Literal["max-gap", "input", "output", "middle", "both"]
Dtype = Literal["fp32", "fp16", "bf16"]
ComputeDtype = Literal["fp32", "stored"]
Device = Literal["cpu", "cuda"]
Format = Literal["none", "onnx"]
Steps = Literal["prune,quantize", "quantize,prune"]
Judge = Literal["bound", "point"]
# Options that 0.1.0 did not have. With their defaults a recipe has the fingerprint that it had then.
_YOUNGER = ("heal_micro_batch", "heal_dtype", "heal_optimizer", "heal_original", "lora_base", "compute_dtype")
# The replacement in the paper of each method. The papers of the other methods have none.
_PAPERS_REPLACEMENT: dict[str, Replacement] = {"llm-streamline": "layer"}
# The default method for each replacement. Trained replacements get `llm-streamline`, whose paper proposes them. Linear
# maps lose less with single layers, as `shortgpt` chooses them, than with a block (measured: `docs/methods.md`). With
# corrections `shifted` loses a little less than `sleb` (measured there too), but takes two to three times as long.
_METHOD_FOR: dict[Replacement, str] = {"none": "auto", "linear": "shortgpt", "corrected": "sleb"}


@documented
@dataclass(frozen=True)
class Pruning(CheckedOptions):
    """Which layers are removed, and what replaces them."""

    method: Annotated[
        str | None,
        Option(
            "How the layers are chosen.",
            default="explicit with `layers`, shortgpt with replacement linear, sleb with replacement corrected, "
            "llm-streamline with a trained replacement, else auto",
        ),
    ] = None
    remove: Annotated[
        int | str | None,
        Option(
            "Number of layers that the model loses, such as 4, or a share of its layers, such as 25%. A trained "
            "replacement counts as a layer that stays.",
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
            "Number of first layers and of last layers that are never removed. For the methods shifted, sleb, "
            "shortened-taylor and shortened-ppl.",
            default="of sleb: 1,1; of shortened-taylor: 4,2; of shifted: 0,0; of shortened-ppl: 0,0",
            metavar="FIRST,LAST",
            pattern=r"0*[0-9]{1,9},0*[0-9]{1,9}",
            form="must be two numbers, how many of the first and of the last layers, such as 1,1",
        ),
    ] = None
    pattern: Annotated[
        Pattern | None, Option("Positions of the layers to remove. For method layerchop.", default="max-gap")
    ] = None
    packed: Annotated[
        bool,
        Option(
            "Remove attentions and MLPs so that the rest makes whole layers, and the checkpoint has fewer layers. "
            "Otherwise zeros stay where a layer has lost one of the two. For the methods blockpruner and auto."
        ),
    ] = True
    replacement: Annotated[
        Replacement | None,
        Option(
            "What replaces the removed layers. linear is a least-squares linear map, folded into what comes before "
            "them. corrected fits the output projections of what is left again, by least squares. The others are "
            "trained and replace one block: layer is a decoder layer, mlp a layer without attention; ffn and swiglu "
            "have no norm or residual, and their checkpoint needs optimum.streamline.load.",
            default="layer for llm-streamline; none, linear or corrected for auto; else none",
        ),
    ] = None


@documented
@dataclass(frozen=True)
class Calibration(CheckedOptions):
    """Text on which layers are scored and chosen. Method auto reads more of it, to compare plans."""

    data: Annotated[str, Option("Calibration text.", key="calibration", metavar="SPEC")] = CHOOSING_TEXT
    samples: Annotated[int, Option("Number of windows of calibration text."), Gt(0), Le(HUGE)] = 128


@documented
@dataclass(frozen=True)
class Quantization(CheckedOptions):
    """How the result is quantized: the checkpoint, by bitsandbytes or torchao, or its ONNX export."""

    quantizer: Annotated[str, Option("Name of the quantizer.", key="quantize")] = NONE
    exclude: Annotated[
        str | None,
        Option(
            "Layers and modules that stay in float, separated by commas: layer numbers of the original, and module "
            "names such as lm_head or *.mlp.down_proj.",
            key="quantize_exclude",
            metavar="WHAT",
            commas="0,*.mlp.down_proj",
        ),
    ] = None
    steps: Annotated[
        Steps | None,
        Option(
            "Order of pruning and quantization. With quantize,prune the layers are chosen in the quantized model; then "
            "only whole layers can be removed.",
            default="prune,quantize",
            commas="quantize,prune",
        ),
    ] = None


@documented
@dataclass(frozen=True)
class Export(CheckedOptions):
    """Export of the checkpoint to another format."""

    format: Annotated[Format, Option("Format of the export.")] = "none"


@documented
@dataclass(frozen=True)
class Evaluation(CheckedOptions):
    """How the candidate is compared with the original."""

    data: Annotated[str, Option("Evaluation text.", key="eval_data", metavar="SPEC")] = JUDGING_TEXT
    samples: Annotated[int, Option("Number of windows of evaluation text.", key="eval_samples"), Gt(1), Le(HUGE)] = 64
    judge: Annotated[
        Judge,
        Option("How limits are judged: bound requires the whole 95% interval within the limit, point only the value."),
    ] = "bound"


@documented
@dataclass(frozen=True)
class Budget(CheckedOptions):
    """Limits that the candidate must hold. A limit that is left out is not judged."""

    max_ppl_ratio: Annotated[
        float | None, Option("Largest perplexity of the candidate, divided by the original's."), Gt(0)
    ] = None
    max_kl: Annotated[float | None, Option("Largest mean KL(original || candidate), in nats per token."), Ge(0)] = None
    min_speedup: Annotated[
        float | None,
        Option("Smallest decode speed-up: time per token of the original, divided by the candidate's, in one runtime."),
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
    """All options of one run.

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
    length: Annotated[int, Option("Tokens in one window of text."), Gt(7), Le(HUGE)] = 512
    dtype: Annotated[
        Dtype | None,
        Option(
            "Number type in which weights are stored, or in which `validate` computes.",
            default="the original's for a checkpoint, fp32 for an export and for `validate`",
        ),
    ] = None
    compute_dtype: Annotated[
        ComputeDtype,
        Option(
            "Number type in which the original computes while its layers are scored and chosen: fp32, or the one in "
            "which its weights are stored, which takes less memory. stored is for removing layers only. Sums over "
            "windows are in fp64 in any case."
        ),
    ] = "fp32"
    device: Annotated[Device, Option("Device on which the model runs.")] = "cpu"
    max_memory: Annotated[
        int | str | None,
        Option(
            "Memory to make do with, in bytes or such as 8GB. Weights that do not fit stay on disk.",
            default="the memory that is free",
            metavar="SIZE",
            pattern=r"\s*[0-9]+(\.[0-9]+)?\s*[kKmMgG]?[bB]?\s*",
            form="must be a number of bytes, or a size such as 500MB or 1.5GB",
        ),
    ] = None
    seed: Annotated[int, Option("Seed of all random numbers."), Ge(0), Lt(2**63)] = 0

    @property
    def resolved_replacement(self) -> Replacement:
        """The replacement; if it is left out, the one in the method's paper."""
        return self.pruning.replacement or _PAPERS_REPLACEMENT.get(self.pruning.method or "", "none")

    @property
    def resolved_replace(self) -> float:
        """The share of the tokens that later passes of `distill` replace; 0 if there are no such passes."""
        if "distill" not in self.resolved_trainings or self.healing.epochs == 1:
            return 0.0
        if self.healing.replace is not None:
            return self.healing.replace
        return REPLACED if self.healing.cache in (None, "none") else 0.0

    @property
    def resolved_kl(self) -> float:
        """The weight of the KL divergence in `distill`; next-token cross-entropy has the rest."""
        if self.healing.kl is not None:
            return self.healing.kl
        much = self.healing.tokens * self.healing.epochs >= MUCH
        return KL_WITH_REPLACED if self.resolved_replace and much else 1.0

    @property
    def resolved_method(self) -> str:
        """The method; if it is left out, the one that follows from the layers and the replacement."""
        if self.pruning.method is not None:
            return self.pruning.method
        if self.pruning.layers is not None:
            return "explicit"
        return _METHOD_FOR.get(self.resolved_replacement, "llm-streamline")

    @property
    def resolved_trainings(self) -> tuple[str, ...]:
        """The trainings, in order; if they are left out, the default of the replacement or of the method.

        A trained replacement gets `hidden-mse` by default: without training it would be worse than no replacement.
        """
        given = self.healing.trainings
        if given is not None:
            return () if given == "none" else tuple(given.split("+"))
        if self.resolved_replacement in ("layer", "mlp", "ffn", "swiglu"):
            return ("hidden-mse",)
        default = _PAPERS_HEALING.get(self.resolved_method)
        return () if default is None else (default,)

    def heal_batch(self, training: str) -> int:
        """The number of windows in one update of a training, over all processes.

        Distillation profits from small updates (measured: `docs/methods.md`). The default is a multiple of the number
        of processes.

        Args:
            training: One of `resolved_trainings`.
        """
        if self.healing.batch is not None:
            return self.healing.batch
        least, processes = 2 if training == "distill" else 4, process_count()
        return -(-least // processes) * processes

    @property
    def quantize_first(self) -> bool:
        """Whether the model is quantized before its layers are chosen and removed."""
        return self.quantization.steps == "quantize,prune"

    @property
    def excluded(self) -> list[str]:
        """The patterns of layers and modules that stay in float."""
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

    def recorded_options(self) -> dict[str, Any]:
        """The options that files record: options with another value than the default, and texts.

        The keys are the names of the flags, with underscores.
        """
        always = {"calibration", "eval_data", *(["heal_data"] if self.resolved_trainings else [])}
        values = {key: self._value(defined) for key, defined in OPTIONS.items()}
        return {key: value for key, value in values.items() if value != OPTIONS[key].default or key in always}

    def to_dict(self) -> dict[str, Any]:
        """The recorded options in their groups, as in a YAML file."""
        fields: dict[str, Any] = {}
        for key, value in self.recorded_options().items():
            defined = OPTIONS[key]
            (fields.setdefault(defined.group, {}) if defined.group else fields)[defined.name] = value
        return fields

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the options that affect the checkpoint: all but the export, the evaluation and the budget."""
        without_effect = ("export", "evaluation", "budget")
        fields = {key: self._value(defined) for key, defined in OPTIONS.items() if defined.group not in without_effect}
        if self.quantization.quantizer not in QUANTIZERS and not self.quantize_first:  # only the export is quantized
            for key in ("quantize", "quantize_exclude"):
                del fields[key]
        fields["steps"] = self.quantize_first
        # Recipes with the same meaning have the same fingerprint: `remove: 4` and `remove: "4"`, or a method that is
        # named and the same method by default.
        pattern = (self.pruning.pattern or "max-gap") if self.resolved_method == "layerchop" else None
        fields |= {"method": self.resolved_method, "pattern": pattern, "heal": list(self.resolved_trainings)}
        # `auto` may choose one, but only if no replacement is given; a given `none` differs.
        open_choice = self.resolved_method == "auto"
        fields["replacement"] = self.pruning.replacement if open_choice else self.resolved_replacement
        fields["remove"] = str(self.pruning.remove)
        # What packs no more than 0.1.0 did has the fingerprint of then. `auto` has more candidates now.
        if self.resolved_method != "auto" and self.pruning.packed != (self.resolved_method == "blockpruner"):
            del fields["packed"]
        if "distill" not in self.resolved_trainings:  # what was once the default of all trainings
            fields["heal_batch"] = self.healing.batch or 4
        for key in ("max_memory", "gradient_checkpointing"):  # they give the same result
            del fields[key]
        for key in _YOUNGER:
            if fields[key] == OPTIONS[key].default:
                del fields[key]
        del fields["heal_replace"]
        if self.resolved_replace:
            fields |= {"heal_replace": self.resolved_replace, "heal_kl": self.resolved_kl}
        if self.healing.cache in (None, "none", "full"):  # with all logits, or without any, the training is the same
            del fields["heal_cache"]
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()

    def _value(self, defined: DefinedOption) -> Any:
        return getattr(getattr(self, defined.group) if defined.group else self, defined.name)


OPTIONS: dict[str, DefinedOption] = {each.key: each for each in options_of(Recipe)}
"""Every option, by the name of its flag with underscores."""
GROUPS: dict[str, type[CheckedOptions]] = groups_of(Recipe)
"""The groups, by their field of the recipe."""
