"""What a validation found: one `Measurement` a model, a `Verdict`, and all it takes to read and repeat them.

Plain values that go to JSON and back. Knows neither how they were measured nor how they are shown.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from optimum.streamline.editing.plan import PlannedLayer
from optimum.streamline.errors import StreamlineError
from optimum.streamline.recipe.recipe import Judge

from .intervals import Interval

Role = Literal["original", "candidate"]


@dataclass(frozen=True)
class Measurement:
    """Everything measured of one model, beside what it is compared with.

    Args:
        label: What the report calls it.
        path: Where it is; empty for one that was only made to be measured.
        commit: The commit of the Hub repository that it was read from; empty for a local folder.
        role: Whether it is the original, in whatever runtime, or made from it.
        runtime: What ran it.
        dtype: What it was computed in.
        baseline: Label of the model that its speed and size are held against.
        parameters: Weights in the file.
        live_parameters: Weights left when skipped sublayers are dropped.
        layers: Decoder layers.
        attention_layers: Decoder layers that attend.
        kv_bytes_per_token: Growth of the cache per token, bytes.
        disk_bytes: Weights on disk, bytes.
        size_ratio: `disk_bytes` over the baseline's.
        perplexity: On the evaluation windows.
        perplexity_ratio: Over the original's, paired.
        kl: Mean KL(original || this), nats per token.
        agreement: Share of tokens with the original's likeliest next token.
        prefill_ms: Time to first token.
        decode_ms: Time per further token.
        prefill_speedup: Baseline's time over this one's, paired; above 1 is faster.
        decode_speedup: The same of decoding.
        ideal_prefill_speedup: Ratio of FLOPs.
        ideal_decode_speedup: Ratio of bytes read per token.
        peak_bytes: Most memory its process held, bytes.
        question_accuracy: Share of multiple-choice questions answered right, where there were some.
        stability: LLM-Streamline's stability on them against the original (`stability.Answers.stability`).
        files: SHA-256 of each of its files that was read for this, by name.
        changed: Of a model made here, how these differ from what its record says was written, one phrase a file.
    """

    label: str
    path: str
    role: Role
    runtime: str
    dtype: str
    baseline: str
    parameters: int
    live_parameters: int
    layers: int
    attention_layers: int
    kv_bytes_per_token: int
    disk_bytes: int
    size_ratio: float
    perplexity: Interval
    perplexity_ratio: Interval
    kl: Interval
    agreement: Interval
    prefill_ms: Interval
    decode_ms: Interval
    prefill_speedup: Interval
    decode_speedup: Interval
    ideal_prefill_speedup: float
    ideal_decode_speedup: float
    peak_bytes: int
    question_accuracy: Interval | None = None
    stability: Interval | None = None
    commit: str = ""
    files: dict[str, str] = field(default_factory=dict)
    changed: tuple[str, ...] = ()

    @property
    def finite(self) -> bool:
        """Whether the model's logits gave figures that are numbers."""
        return self.perplexity.finite and self.perplexity_ratio.finite and self.kl.finite


@dataclass(frozen=True)
class Limit:
    """One limit held against one model.

    Args:
        name: The budget's field, or `finite`: logits must be numbers, whatever the budget.
        label: The model's.
        limit: What is allowed, None for `finite`.
        measured: The figure.
        interval: Its interval; None where there is none.
        judged: What was held against the limit: an end of the interval, or the figure.
    """

    name: str
    label: str
    limit: float | None
    measured: float
    interval: Interval | None
    judged: float

    @property
    def least(self) -> bool:
        """Whether the figure must be at least the limit, rather than at most."""
        return self.name.startswith("min_")

    @property
    def passed(self) -> bool:
        """Whether it holds: what was judged is within it, and so is the figure."""
        return self._allows(self.measured) and self._allows(self.judged)

    @property
    def undecided(self) -> bool:
        """Whether the figure is within the limit, and what was judged, the end of its interval, is not."""
        return not self.passed and self._allows(self.measured) and math.isfinite(self.judged)

    def _allows(self, figure: float) -> bool:
        # NaN is not within anything, nor is infinity.
        if self.limit is None or not math.isfinite(figure):
            return False
        return figure >= self.limit if self.least else figure <= self.limit


@dataclass(frozen=True)
class Verdict:
    """All limits, judged.

    Args:
        limits: One a limit and model.
        judge: By what of each figure, as in a recipe.
    """

    limits: tuple[Limit, ...]
    judge: Judge = "bound"

    @property
    def passed(self) -> bool:
        """Whether every limit holds; with none set, it does."""
        return all(limit.passed for limit in self.limits)

    @property
    def undecided(self) -> bool:
        """Whether some limits do not hold, each of them undecided."""
        return not self.passed and all(limit.passed or limit.undecided for limit in self.limits)


@dataclass(frozen=True)
class Interaction:
    """How removing layers and quantizing meet, in mean log-losses of the same tokens, nats; each interval is paired.

    Args:
        quantizer: Its name.
        steps: The order, as a recipe has it.
        dense: Label of the original; so are `pruned`, `quantized` and `both` of the models made of it.
        pruning: L_pruned - L_dense.
        quantizing: L_quantized - L_dense.
        together: L_both - L_dense.
        term: L_both - L_pruned - L_quantized + L_dense: what the two together cost beyond what each costs alone.
        missing: Why there is no model that had both in this order; then the labels and figures are not there.
    """

    quantizer: str
    steps: str
    dense: str = ""
    pruned: str = ""
    quantized: str = ""
    both: str = ""
    pruning: Interval | None = None
    quantizing: Interval | None = None
    together: Interval | None = None
    term: Interval | None = None
    missing: str = ""


@dataclass(frozen=True)
class Report:
    """A validation's outcome.

    Args:
        rows: One a model, the original first.
        verdict: The budget, judged.
        settings: What was asked for, and what of it could be used.
        machine: What it ran on, with versions.
        data: What `Windows.describe` says of the evaluation text.
        seed: Of the bootstrap.
        scores: Block Influence of every original layer, where known.
        layers: The new model's layers and the original ones they stand for, where known.
        steps: Seconds each step of the run took, where known.
        recipe: The recipe's fields, where there was one.
        questions: The multiple-choice questions' file, number and fingerprint, and how many of them the weights of
            the stability amount to; where there were some.
        interactions: How removing layers and quantizing meet, where that was asked.
    """

    rows: tuple[Measurement, ...]
    verdict: Verdict
    settings: dict[str, str | int]
    machine: dict[str, str | int]
    data: dict[str, Any]
    seed: int
    scores: tuple[float, ...] | None = None
    layers: tuple[PlannedLayer, ...] | None = None
    steps: dict[str, float] | None = None
    recipe: dict[str, Any] | None = None
    questions: dict[str, str | int | float] | None = None
    interactions: tuple[Interaction, ...] = ()

    @property
    def exit_code(self) -> int:
        """0 within budget, 3 over."""
        return 0 if self.verdict.passed else 3

    def to_json(self) -> str:
        """Strict JSON; a figure that is not a number is the string `NaN`, `Infinity` or `-Infinity`.

        Beside the fields stand what scripts look for (`passed`, `exit_code`) and `digest`, the SHA-256 of all the rest.
        """
        fields = {**asdict(self), "passed": self.verdict.passed, "exit_code": self.exit_code}
        limits = [{**asdict(limit), "passed": limit.passed} for limit in self.verdict.limits]
        fields["verdict"] = {**fields["verdict"], "limits": limits}
        fields = _spell_out(fields)
        return json.dumps({**fields, "digest": _digest(fields)}, indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Report:
        """The report that `to_json` wrote.

        Raises:
            StreamlineError: it is not one, or has been changed since it was written.
        """
        try:
            fields = json.loads(text)
            report = TypeAdapter(cls).validate_python(fields)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"])
            raise StreamlineError(f"not a report: {place or 'the text'}: {first['msg']}") from None
        except (ValueError, RecursionError) as error:
            raise StreamlineError(f"not a report: the text: {error}") from None
        if fields.pop("digest", None) != _digest(fields):
            raise StreamlineError("not the report that was written: its digest is of other content")
        return report


def _digest(fields: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def _spell_out(value: Any) -> Any:
    # pydantic's `ser_json_inf_nan` does this as it writes JSON, which is too late for the digest.
    if isinstance(value, dict):
        return {key: _spell_out(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_spell_out(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value
