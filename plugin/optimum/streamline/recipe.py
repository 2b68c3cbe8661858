"""The recipe: everything that decides a run, as one frozen value that YAML, flags and Python all make.

Knows names and ranges. What a method makes of them is the method's own `check`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import unicodedata
from pathlib import Path
from reprlib import Repr
from typing import Any, Literal, TypeVar

from pydantic import ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass

from .core_yaml import dump_yaml, parse_yaml
from .errors import StreamlineError
from .quantizers import NONE, QUANTIZERS

# General text of a size that any model can be chosen, healed and judged on; its two splits share no article.
CHOOSING_TEXT = "hub:Salesforce/wikitext,wikitext-103-raw-v1,train"
JUDGING_TEXT = "hub:Salesforce/wikitext,wikitext-103-raw-v1,test"
# A value is of its field's type already: `"16"`, `16.0` and `true` are no integers.
_STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
_HUGE = 10**9
_LONGEST_FILE = 2**16  # bytes of a recipe
_HEAL = r"^(none|(hidden-mse|lm|distill)(\+(lm|distill))*)$"
# What a field that has a form of its own should look like.
_FORMS = {
    "heal": "must be none, or one or more of hidden-mse (first), lm and distill, joined by +",
    "budget": "must be limits with their values, such as max_ppl_ratio: 1.1",
    "protect": "must be two numbers, how many of the first and of the last layers, such as 1,1",
}
# What a field of a type takes, where pydantic's words leave that open.
_TYPES = {
    "bool_type": "must be true or false",
    "int_type": "must be an integer",
    "float_type": "must be a number",
    "string_type": "must be a string (in quotes, if it looks like a number)",
}
_LISTS = {"layers": "3,7,11-13", "quantize_exclude": "0,*.mlp.down_proj", "steps": "quantize,prune"}
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
        method: How layers are chosen: a name in `methods.METHODS`. Left out, it follows from the rest: `explicit`
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
        quantize: How the result is quantized: a key of `quantizers.QUANTIZERS`, or of the exporters' `WAYS` for the
            ONNX export.
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


def make_recipe(fields: dict[str, Any], origin: str = "recipe") -> Recipe:
    """A recipe from plain fields.

    Args:
        origin: What a message calls the fields' source.

    Raises:
        StreamlineError: the first field that is unknown, of another type or out of range, and what would be right.
    """
    _refuse_unknown(Recipe, fields, origin)
    remove = fields.get("remove")
    if remove is not None and (isinstance(remove, bool) or not isinstance(remove, (int, str))):
        raise StreamlineError(f"{origin}: remove is {shown(remove)}: must be a number of layers or a share such as 25%")
    fields = {**fields, **{name: _joined(name, fields[name], origin) for name in _LISTS if name in fields}}
    for name, value in fields.items():
        if isinstance(value, str) and not _is_text(value):
            field = name.replace("_", "-")
            raise StreamlineError(f"{origin}: {field} is {shown(value)}: holds a character that cannot be printed")
    if isinstance(fields.get("budget"), dict):
        _refuse_unknown(Budget, fields["budget"], f"{origin}: budget")
        fields["budget"] = _validated(Budget, fields["budget"], origin, "budget.")
    return _validated(Recipe, fields, origin)


_Fields = TypeVar("_Fields", Budget, Recipe)


def _refuse_unknown(kind: type[Budget | Recipe], fields: dict[str, Any], where: str) -> None:
    known = [field.name for field in dataclasses.fields(kind)]
    for key in fields:
        if key not in known:
            raise StreamlineError(f"{where}: unknown key {shown(key)}; known are {', '.join(known)}")


def _validated(kind: type[_Fields], fields: dict[str, Any], origin: str, prefix: str = "") -> _Fields:
    try:
        return kind(**fields)
    except ValidationError as error:
        first = error.errors()[0]
    field = prefix + str(first["loc"][0]).replace("_", "-")
    message = _TYPES.get(first["type"], first["msg"])
    if first["type"] in ("string_pattern_mismatch", "dataclass_exact_type"):
        message = _FORMS[field]
    raise StreamlineError(f"{origin}: {field} is {shown(first['input'])}: {message}")


def _joined(name: str, value: Any, origin: str) -> Any:
    """What a field that is a list by commas is given: the text itself, one number, or a list of both."""
    items = value if isinstance(value, list) else [value]
    if all(isinstance(each, (int, str)) and not isinstance(each, bool) for each in items):
        return ",".join(str(each) for each in items)
    if isinstance(value, list):
        name, form = name.replace("_", "-"), _LISTS[name]
        raise StreamlineError(f"{origin}: {name} is {shown(value)}: must be one list, or written as {form}")
    return value


def _is_text(value: str) -> bool:
    """Whether it could name a file (bytes of one that are no UTF-8 are surrogates) and has no control characters."""
    try:
        value.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return False
    return not any(unicodedata.category(character) == "Cc" for character in value)


def shown(value: Any) -> str:
    """A value as a message quotes it: of any length in a few dozen characters.

    >>> shown("a" * 1000)
    "'aaaaaaaaaaaaaaaaaaaaaaaaaaaaa...aaaaaaaaaaaaaaaaaaaaaaaaaaaaa'"
    """
    brief = Repr()
    brief.maxstring = brief.maxother = brief.maxlong = 63
    brief.maxlevel = 2
    return brief.repr(value)


def read_recipe(path: Path) -> dict[str, Any]:
    """The fields of a recipe file, not yet checked.

    Raises:
        StreamlineError: the file cannot be read, is too long, or is not a YAML mapping.
    """
    try:
        with path.open("rb") as stream:
            content = stream.read(_LONGEST_FILE + 1)  # of what may have no end
    except (OSError, ValueError) as error:  # the latter of a path that cannot be
        raise StreamlineError(f"recipe {path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    if len(content) > _LONGEST_FILE:
        raise StreamlineError(f"recipe {path}: is no recipe, it is longer than {_LONGEST_FILE} bytes")
    try:
        fields = parse_yaml(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise StreamlineError(f"recipe {path}: is not text in UTF-8 (byte {error.start + 1})") from None
    except ValueError as error:
        raise StreamlineError(f"recipe {path}: {error}") from None
    if not isinstance(fields, dict):
        raise StreamlineError(f"recipe {path}: must be keys with values, such as `remove: 25%`")
    return fields


def write_recipe(recipe: Recipe) -> str:
    """The recipe as YAML that `read_recipe` takes back to the same recipe."""
    return dump_yaml(recipe.to_dict())


def parse_layers(text: str, total: int) -> tuple[int, ...]:
    """Layer numbers from `3,7,11-13`.

    Raises:
        StreamlineError: not of that form, or not below `total`.

    >>> parse_layers("3,7,11-13", 16)
    (3, 7, 11, 12, 13)
    """
    numbers: set[int] = set()
    for item in text.split(","):
        match = re.fullmatch(r"\s*(0*[0-9]{1,9})\s*(?:-\s*(0*[0-9]{1,9})\s*)?", item)
        if not match:
            raise StreamlineError(f"layers {shown(text)}: {shown(item)} is not a number or a range; write 3,7,11-13")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise StreamlineError(f"layers {shown(text)}: the range {shown(item)} runs backwards")
        if last >= total:
            raise StreamlineError(
                f"layers {shown(text)}: there is no layer {last}; the model has layers 0 to {total - 1}"
            )
        numbers.update(range(first, last + 1))
    return tuple(sorted(numbers))


def parse_remove(value: int | str, total: int) -> int:
    """The net number of layers to lose, of `total`: a number, or a share rounded to the nearest whole layer.

    Raises:
        StreamlineError: not such a number, or nothing or everything would go.

    >>> parse_remove("25%", 12)
    3
    """
    text = str(value).strip()
    match = re.fullmatch(r"(0*[0-9]{1,9}(?:\.[0-9]+)?)(%?)", text)
    if not match or (not match[2] and "." in match[1]):
        raise StreamlineError(f"remove {shown(value)}: must be a number of layers or a share such as 25%")
    count = int(float(match[1]) * total / 100 + 0.5) if match[2] else int(match[1])
    if not 0 < count < total:
        raise StreamlineError(f"remove {value!r}: that is {count} of {total} layers; at least 1 must go and 1 stay")
    return count
