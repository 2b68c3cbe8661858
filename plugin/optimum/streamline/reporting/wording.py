"""The words of a report: the rows of its table, the sentences of its verdict, and its settings.

Terminal, Markdown and HTML share them (`text_forms.py`, `html.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from optimum.streamline.evaluation.intervals import Interval
from optimum.streamline.evaluation.results import Limit, Measurement, Report
from optimum.streamline.evaluation.verdict import more_to_settle

from .numbers import number, percent, size, with_interval


@dataclass(frozen=True)
class TableRow:
    """A row of the comparison table.

    Args:
        group: The heading of the group that the row belongs to.
        title: The name of the row.
        meaning: An explanation for a reader who does not know the term.
        cell: A function from a measurement to the text of the cell; empty if the figure was not measured.
    """

    group: str
    title: str
    meaning: str
    cell: Callable[[Measurement], str]


LIMIT_NAMES = {
    "max_ppl_ratio": "perplexity ratio",
    "max_kl": "KL divergence from the original",
    "min_speedup": "decode speed-up",
    "max_size_ratio": "size ratio",
}

JUDGE_NAMES = {
    "bound": "bound: the whole interval must be within a limit",
    "point": "point: the figure itself must be within a limit",
}

SETTING_NAMES = {
    "judge": "judged by",
    "spec": "evaluation text",
    "windows": "evaluation windows",
    "length": "tokens a window",
    "fingerprint": "fingerprint of the tokens",
    "commit": "commit of the text",
    "possible": "windows that the text has room for",
    "documents": "documents that the windows come from",
    "prefix": "tokens at the start of every window",
    "separator": "tokens between two documents",
    "read_characters": "characters of the text that were read",
    "whole": "the whole text was read",
    "resampled": "intervals resample",
    "questions_file": "file of questions",
    "questions_effective": "effective number of questions for the stability",
}


def table_rows(report: Report) -> list[TableRow]:
    """The rows that have a figure for at least one model."""
    return [line for line in TABLE_ROWS if any(line.cell(row) for row in report.rows)]


def note(report: Report) -> str:
    """How the figures of the table were measured, and what the brackets mean."""
    data, settings = report.data, report.settings
    pairs = (
        "Ratios and their intervals are paired: both models read the same text, and took turns on the same machine."
        if "in_memory" not in settings
        else "Ratios of accuracy and their intervals are paired: both models read the same text. The models did not "
        "fit into memory together and were timed one after another, so ratios of times are not paired."
    )
    return (
        f"Accuracy was measured on {data['windows']} windows of {data['length']} tokens of {data['spec']}"
        f"{_drawn(data)}. Times are for one sequence: a prompt of {settings['prompt_length']} tokens, then "
        f"{settings['decode_tokens']} tokens one by one, in {settings['rounds']} rounds. Brackets hold 95% bootstrap "
        f"intervals, over {settings.get('resampled', 'windows')} for accuracy and over rounds for times. {pairs}"
    )


def _drawn(data: dict[str, Any]) -> str:
    if "possible" not in data:
        return ""
    text = "the text" if data["whole"] else f"its first {data['read_characters']:,} characters"
    return f", drawn at random from {data['possible']:,} windows in {text}"


def headline(report: Report) -> str:
    """The verdict in a few words."""
    if not report.verdict.limits and report.interactions:
        return "Pruning and quantizing, alone and together"
    if not report.verdict.limits:
        return "No budget was set"
    if report.verdict.undecided:
        return "Not shown to be within budget"
    return "Within budget" if report.verdict.passed else "Over budget"


def sentences(report: Report) -> list[str]:
    """The results of each candidate in a few sentences."""
    return [_sentence(row, report) for row in report.rows if row.role == "candidate"]


def limit_sentence(limit: Limit, report: Report) -> str:
    """Whether a limit holds, and what would settle an undecided one."""
    if limit.limit is None:
        return f"{limit.label}: some of its logits are not finite numbers, so it fails any budget"
    allowed = f"{'at least' if limit.least else 'at most'} {limit.limit:g}"
    figure = number(limit.measured, 4) if limit.interval is None else with_interval(limit.interval, digits=4)
    outcome = "holds" if limit.passed else "does not hold"
    if limit.undecided:
        settle = _what_would_settle(limit, report)
        outcome = f"undecided, because the figure is within the limit but its interval is not; {settle}"
    elif limit.passed and limit.interval is not None:
        beyond = limit.interval.low < limit.limit if limit.least else limit.interval.high > limit.limit
        outcome += ", but its interval reaches past the limit" if beyond else ""
    return f"{limit.label}: {LIMIT_NAMES[limit.name]} {figure}, {allowed} allowed: {outcome}"


def warnings(report: Report) -> list[str]:
    """A warning for each model whose files differ from its record."""
    return [
        f"{row.label}: {'; '.join(row.changed)}. The record does not describe the model that was measured."
        for row in report.rows
        if row.changed
    ]


def _what_would_settle(limit: Limit, report: Report) -> str:
    timed = limit.name == "min_speedup"
    unit = "rounds" if timed else "windows"
    count = int(report.settings["rounds"] if timed else report.data["windows"])
    more = more_to_settle(limit, count)
    if more is None:
        return f"the figure equals the limit, so no number of {unit} would settle it"
    room = None if timed else report.data.get("possible")
    if room is not None and count + more > room:
        return f"about {more:,} more {unit} would settle it, but this text has only {room:,} in all: give more text"
    flag = f" ({'validate --rounds' if timed else '--eval-samples'} {count + more})"
    temporary = timed and report.interactions  # `orthogonality` deletes its models, and has no flag for rounds
    return f"about {more:,} more {unit}{'' if temporary else flag} would settle it, if the figure stays the same"


def settings_lines(report: Report) -> list[tuple[str, str]]:
    """The settings, the evaluation text and the machine, as (name, value)."""
    entries = {
        **report.data,
        **report.settings,
        **(report.questions or {}),
        "seed": report.seed,
        "judge": JUDGE_NAMES[report.verdict.judge],
        **report.machine,
    }
    lines = [
        (SETTING_NAMES.get(key, key.replace("_", " ")), number(value) if isinstance(value, float) else str(value))
        for key, value in entries.items()
        if key != "memory_bytes"
    ]
    lines.append(("memory", size(float(report.machine.get("memory_bytes", 0)))))
    return lines + [(f"seconds to {step}", number(seconds)) for step, seconds in (report.steps or {}).items()]


def _sentence(row: Measurement, report: Report) -> str:
    original = report.rows[0]
    baseline = next(each for each in report.rows if each.label == row.baseline)
    text = (
        f"{row.label} ({row.runtime}) decodes {with_interval(row.decode_speedup)} times as fast as {row.baseline}, "
        f"and reads a prompt {with_interval(row.prefill_speedup)} times as fast. "
    )
    if row.finite:
        text += (
            f"Its perplexity is {with_interval(row.perplexity_ratio, digits=4)} times the perplexity of "
            f"{original.label}, and it predicts the same next token {percent(row.agreement)} of the time."
        )
    else:
        text += "Some of its logits are not finite numbers: the model is broken on this text."
    text += _answering(row, original)
    if row.decode_speedup.low <= 1 <= row.decode_speedup.high:
        text += " The interval of the decode speed-up contains 1, so no difference in speed was shown."
    if baseline.runtime != row.runtime:
        text += (
            f" {row.baseline} ran on {baseline.runtime}, so the speed-ups and the size ratio include the effect of the "
            "change of runtime. To see the effect of the model alone, add an export of the original to the comparison."
        )
    return text


def _answering(row: Measurement, original: Measurement) -> str:
    if row.question_accuracy is None or original.question_accuracy is None or row.stability is None:
        return ""
    return (
        f" It answers {percent(row.question_accuracy)} of the questions correctly, and {original.label} answers "
        f"{percent(original.question_accuracy)}. Its stability is {percent(row.stability)}."
    )


def _ideal(row: Measurement, measured: Interval, ideal: float) -> str:
    text = f"{number(ideal)}x"
    return text if row.label == row.baseline else f"{text} ({100 * measured.value / ideal:.0f}% reached)"


def _layers(row: Measurement) -> str:
    return str(row.layers) + (f", {row.attention_layers} with attention" if row.attention_layers < row.layers else "")


def _parameters(row: Measurement) -> str:
    live = f", {number(row.live_parameters / 1e6)} M in use" if row.live_parameters < row.parameters else ""
    return f"{number(row.parameters / 1e6)} M{live}"


TABLE_ROWS: tuple[TableRow, ...] = (
    TableRow(
        "Model",
        "Runtime",
        "The program that ran the model, and the dtype or quantizer that it computed with.",
        lambda r: f"{r.runtime}, {r.dtype}",
    ),
    TableRow(
        "Model", "Baseline", "The model that the speed and size of this column are compared with.", lambda r: r.baseline
    ),
    TableRow("Model", "Commit", "The commit of the Hub repository that it was read from.", lambda r: r.commit[:12]),
    TableRow("Model", "Layers", "The decoder layers. A layer without attention keeps no cache.", _layers),
    TableRow(
        "Model",
        "Parameters",
        "The weights of the model. Those not in use are zeros of skipped sublayers.",
        _parameters,
    ),
    TableRow(
        "Model",
        "Size on disk",
        "The size of the weight files, and its ratio to the baseline's.",
        lambda r: f"{size(r.disk_bytes)} ({number(r.size_ratio)}x)",
    ),
    TableRow(
        "Model",
        "Cache per token",
        "The memory that the key-value cache takes for each token of context.",
        lambda r: size(r.kv_bytes_per_token),
    ),
    TableRow(
        "Accuracy",
        "Perplexity",
        "How uncertain the model is about the next token. A perplexity of 10 is like a choice among 10 equally likely "
        "tokens. Lower is better.",
        lambda r: with_interval(r.perplexity),
    ),
    TableRow(
        "Accuracy",
        "Perplexity ratio",
        "The perplexity divided by the original's, on the same text. 1 is no change, higher is worse.",
        lambda r: with_interval(r.perplexity_ratio, "x", 4),
    ),
    TableRow(
        "Accuracy",
        "KL from original",
        "The KL divergence of its predictions from the original's, in nats per token. 0 is no change, higher is worse.",
        lambda r: with_interval(r.kl),
    ),
    TableRow(
        "Accuracy",
        "Same next token",
        "How often its most likely next token is the same as the original's.",
        lambda r: percent(r.agreement),
    ),
    TableRow(
        "Accuracy",
        "Correct answers",
        "How often the correct option of a multiple-choice question has the lowest perplexity of all its options.",
        lambda r: percent(r.question_accuracy) if r.question_accuracy else "",
    ),
    TableRow(
        "Accuracy",
        "Stability",
        "How often the model and the original are both right or both wrong on a question. A question counts more if "
        "the original's perplexities of its options differ more (LLM-Streamline).",
        lambda r: percent(r.stability) if r.stability else "",
    ),
    TableRow(
        "Speed",
        "Time to first token",
        "The time to read the prompt: the median over rounds.",
        lambda r: with_interval(r.prefill_ms, " ms"),
    ),
    TableRow(
        "Speed",
        "Prefill speed-up",
        "The baseline's time to first token divided by this model's. Above 1 is faster.",
        lambda r: with_interval(r.prefill_speedup, "x"),
    ),
    TableRow(
        "Speed",
        "Ideal prefill speed-up",
        "The speed-up if only arithmetic took time, and how much of it was reached.",
        lambda r: _ideal(r, r.prefill_speedup, r.ideal_prefill_speedup),
    ),
    TableRow(
        "Speed",
        "Time per token",
        "The time to write one more token: the median over rounds.",
        lambda r: with_interval(r.decode_ms, " ms"),
    ),
    TableRow(
        "Speed",
        "Decode speed-up",
        "The baseline's time per token divided by this model's. Above 1 is faster.",
        lambda r: with_interval(r.decode_speedup, "x"),
    ),
    TableRow(
        "Speed",
        "Ideal decode speed-up",
        "The speed-up if only reading weights and cache took time, and how much of it was reached.",
        lambda r: _ideal(r, r.decode_speedup, r.ideal_decode_speedup),
    ),
    TableRow(
        "Speed",
        "Peak memory",
        "The most memory that its process held: RAM, or GPU memory if torch ran on a GPU.",
        lambda r: size(r.peak_bytes),
    ),
)
