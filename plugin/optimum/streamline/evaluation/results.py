"""The results of a validation: a `Report` with a `Measurement` for each model, the `Verdict`, and all settings.

The classes are plain values. `Report.to_json` writes `report.json`, and `Report.from_json` reads it.
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
    """All figures of one model.

    Args:
        label: The name of the model in the report.
        path: Its path or Hub id; empty for a temporary model.
        role: `original` for the original, in any runtime; `candidate` for a model made from it.
        runtime: The runtime that ran it.
        dtype: The dtype that it computed in, or its quantizer.
        baseline: The label of the model that its speed and size are compared with.
        parameters: The number of weights in its files.
        live_parameters: The number of weights without the skipped sublayers.
        layers: The number of decoder layers.
        attention_layers: The number of decoder layers with attention.
        kv_bytes_per_token: The growth of the key-value cache per token, in bytes.
        disk_bytes: The size of its weights on disk, in bytes.
        size_ratio: `disk_bytes` divided by the baseline's.
        perplexity: The perplexity on the evaluation windows.
        perplexity_ratio: The perplexity divided by the original's, paired.
        kl: The mean KL(original || this model), in nats per token.
        agreement: The share of tokens whose most likely next token is the same as the original's, 0 to 1.
        prefill_ms: The time to first token, in milliseconds.
        decode_ms: The time per further token, in milliseconds.
        prefill_speedup: The baseline's `prefill_ms` divided by this one's, paired. Above 1 is faster.
        decode_speedup: The baseline's `decode_ms` divided by this one's, paired. Above 1 is faster.
        ideal_prefill_speedup: The ratio of FLOPs of the prompt (`theoretical_cost`).
        ideal_decode_speedup: The ratio of bytes read per decoded token (`theoretical_cost`).
        peak_bytes: The most memory that its process held, in bytes.
        question_accuracy: The share of multiple-choice questions answered correctly, 0 to 1, if there were any.
        stability: The stability on these questions (`multiple_choice.Answers.stability`), if there were any.
        commit: The commit of the Hub repository that it was read from; empty for a local folder.
        files: The SHA-256 of each file that was read, by name.
        changed: How its files differ from its own record, one phrase a file; empty if they do not, or without a record.
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
        """Whether the accuracy figures are finite numbers. They are not if the model's logits are not."""
        return self.perplexity.finite and self.perplexity_ratio.finite and self.kl.finite


@dataclass(frozen=True)
class Limit:
    """A limit of the budget, applied to one model.

    Args:
        name: The field of the budget, or `finite`: figures must be finite numbers under any budget.
        label: The label of the model.
        limit: The largest or smallest figure allowed; `None` for `finite`.
        measured: The figure.
        interval: The interval of the figure; `None` if it has none.
        judged: The number that was compared with the limit: an end of the interval, or the figure.
    """

    name: str
    label: str
    limit: float | None
    measured: float
    interval: Interval | None
    judged: float

    @property
    def least(self) -> bool:
        """Whether the limit is a minimum, not a maximum."""
        return self.name.startswith("min_")

    @property
    def passed(self) -> bool:
        """Whether the limit holds: both the figure and the judged number are within it."""
        return self._allows(self.measured) and self._allows(self.judged)

    @property
    def undecided(self) -> bool:
        """Whether the figure is within the limit, but the judged end of its interval is not."""
        return not self.passed and self._allows(self.measured) and math.isfinite(self.judged)

    def _allows(self, figure: float) -> bool:
        # NaN and infinity are within no limit.
        if self.limit is None or not math.isfinite(figure):
            return False
        return figure >= self.limit if self.least else figure <= self.limit


@dataclass(frozen=True)
class Verdict:
    """The verdict on a budget.

    Args:
        limits: One entry for each limit and model.
        judge: Whether limits apply to the end of an interval (`bound`) or to the figure (`point`).
    """

    limits: tuple[Limit, ...]
    judge: Judge = "bound"

    @property
    def passed(self) -> bool:
        """Whether every limit holds. Without limits, the verdict is passed."""
        return all(limit.passed for limit in self.limits)

    @property
    def undecided(self) -> bool:
        """Whether some limits do not hold, and all of those are undecided."""
        return not self.passed and all(limit.passed or limit.undecided for limit in self.limits)


@dataclass(frozen=True)
class Interaction:
    """The interaction of pruning and one quantizer: differences of mean log-losses L on the same tokens.

    All figures are in nats per token, with paired intervals.

    Args:
        quantizer: The name of the quantizer.
        steps: The order of the two, as in a recipe.
        dense: The label of the original.
        pruned: The label of the pruned model.
        quantized: The label of the quantized model.
        both: The label of the model that is pruned and quantized.
        pruning: L(pruned) - L(dense).
        quantizing: L(quantized) - L(dense).
        together: L(both) - L(dense).
        term: L(both) - L(pruned) - L(quantized) + L(dense), the interaction: 0 if the two costs add up.
        missing: Why no model could be pruned and quantized in this order; then there are no labels and figures.
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
    """The result of a validation.

    Args:
        rows: One measurement for each model, the original first.
        verdict: The verdict on the budget.
        settings: The settings of the measurement, as asked for and as used.
        machine: The machine and the versions of packages.
        data: The evaluation text (`Windows.describe`).
        seed: The seed of the bootstrap.
        scores: The Block Influence of every original layer, if known.
        layers: The layers of the pruned model, if known.
        steps: The seconds that each step of the run took, if known.
        recipe: The fields of the recipe, if there was one.
        questions: The file, number and fingerprint of the multiple-choice questions, and the effective number of them
            for the stability; if there were any.
        interactions: The interactions of pruning and quantization, if they were measured.
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
        """The exit code of a command: 0 within the budget, 3 otherwise."""
        return 0 if self.verdict.passed else 3

    def to_json(self) -> str:
        """The report as strict JSON. A figure that is not finite is the string `NaN`, `Infinity` or `-Infinity`.

        Besides the fields it has `passed` and `exit_code`, for scripts, and `digest`, the SHA-256 of everything else.
        """
        fields = {**asdict(self), "passed": self.verdict.passed, "exit_code": self.exit_code}
        limits = [{**asdict(limit), "passed": limit.passed} for limit in self.verdict.limits]
        fields["verdict"] = {**fields["verdict"], "limits": limits}
        fields = _spell_out(fields)
        return json.dumps({**fields, "digest": _digest(fields)}, indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Report:
        """Read a report that `to_json` wrote.

        Raises:
            StreamlineError: the text is not a report, or was changed after it was written.
        """
        try:
            fields = json.loads(text)
            report = TypeAdapter(cls).validate_python(fields)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"])
            raise StreamlineError(f"not a report: {field or 'the text'}: {first['msg']}") from None
        except (ValueError, RecursionError) as error:
            raise StreamlineError(f"not a report: the text: {error}") from None
        if fields.pop("digest", None) != _digest(fields):
            raise StreamlineError("not the report that was written: its digest does not match its content")
        return report


def _digest(fields: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def _spell_out(value: Any) -> Any:
    """`value` with every float that is not finite replaced by its name.

    pydantic's `ser_json_inf_nan` does this only while it writes JSON, which is too late for the digest.
    """
    if isinstance(value, dict):
        return {key: _spell_out(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_spell_out(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value
