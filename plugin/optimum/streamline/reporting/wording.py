"""A report in words: the lines of its table, its verdict in sentences, its settings, for every form it is shown in.

Knows what the figures mean to a reader; nothing of Markdown, HTML or terminals.
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
    """One line of the comparison table.

    Args:
        group: What it is about.
        title: Its name.
        meaning: What it says, for someone who has not met it.
        cell: Its text for one model, empty where that was not measured.
    """

    group: str
    title: str
    meaning: str
    cell: Callable[[Measurement], str]


LIMIT_NAMES = {
    "max_ppl_ratio": "perplexity ratio",
    "max_kl": "KL from the original",
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
    "possible": "windows that the text had room for",
    "documents": "documents that the windows are from",
    "prefix": "tokens that every window begins with",
    "separator": "tokens between two documents",
    "read_characters": "characters of the text that were read",
    "whole": "that is the whole text",
    "resampled": "intervals resample",
    "questions_file": "file of questions",
    "questions_effective": "equal questions that the stability's weights amount to",
}


def table_rows(report: Report) -> list[TableRow]:
    """The lines that say something of at least one model."""
    return [line for line in TABLE_ROWS if any(line.cell(row) for row in report.rows)]


def note(report: Report) -> str:
    """What the figures were measured on, and what the brackets are."""
    data, settings = report.data, report.settings
    return (
        f"Accuracy: {data['windows']} windows of {data['length']} tokens of {data['spec']}{_drawn(data)}. Times: a "
        f"prompt of {settings['prompt_length']} tokens and {settings['decode_tokens']} after it, one sequence, "
        f"{settings['rounds']} rounds. Brackets hold the bootstrap 95% interval: over "
        f"{settings.get('resampled', 'windows')} for accuracy, over rounds for times. A ratio and its "
        "interval are paired: both models saw the same text, and took turns on the same machine."
    )


def _drawn(data: dict[str, Any]) -> str:
    if "possible" not in data:
        return ""
    some = "" if data["whole"] else f" in the first {data['read_characters']:,} characters that were read of it"
    return f", drawn at random from {data['possible']:,}{some}"


def headline(report: Report) -> str:
    """The verdict in a word or two."""
    if not report.verdict.limits and report.interactions:
        return "Pruning and quantizing, alone and together"
    if not report.verdict.limits:
        return "No budget was set"
    if report.verdict.undecided:
        return "Not shown to be within budget"
    return "Within budget" if report.verdict.passed else "Over budget"


def sentences(report: Report) -> list[str]:
    """What was found of each candidate, in a sentence or two."""
    return [_sentence(row, report) for row in report.rows if row.role == "candidate"]


def limit_sentence(limit: Limit, report: Report) -> str:
    """How one limit of a report fared, and what its interval leaves open."""
    if limit.limit is None:
        return f"{limit.label}: its logits are not all numbers, so it fails whatever the budget"
    allowed = f"{'at least' if limit.least else 'at most'} {limit.limit:g}"
    figure = number(limit.measured, 4) if limit.interval is None else with_interval(limit.interval, digits=4)
    outcome = "holds" if limit.passed else "does not hold"
    if limit.undecided:
        outcome = f"undecided, the figure is within and its interval is not; {_what_would_settle(limit, report)}"
    elif limit.passed and limit.interval is not None:
        beyond = limit.interval.low < limit.limit if limit.least else limit.interval.high > limit.limit
        outcome += ", but its interval reaches past the limit" if beyond else ""
    return f"{limit.label}: {LIMIT_NAMES[limit.name]} {figure}, {allowed} allowed: {outcome}"


def warnings(report: Report) -> list[str]:
    """What a reader must know of a model before its figures: that it is not what its record says."""
    return [
        f"{row.label}: {'; '.join(row.changed)}. Its figures are not of what that record describes."
        for row in report.rows
        if row.changed
    ]


def _what_would_settle(limit: Limit, report: Report) -> str:
    timed = limit.name == "min_speedup"
    what = "rounds" if timed else "windows"
    count = int(report.settings["rounds"] if timed else report.data["windows"])
    more = more_to_settle(limit, count)
    if more is None:
        return f"it is at the limit, so no number of {what} would settle it"
    room = None if timed else report.data.get("possible")
    if room is not None and count + more > room:
        return f"about {more:,} more {what} would settle it, and this text has room for only {room:,}: give more text"
    flag = f" ({'validate --rounds' if timed else '--eval-samples'} {count + more})"
    scratch = timed and report.interactions  # the models are gone, and `orthogonality` has no such flag
    return f"about {more:,} more {what}{'' if scratch else flag} would settle it, if the figure stays"


def settings_lines(report: Report) -> list[tuple[str, str]]:
    """What was run, on what: name and value."""
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
    # Another runtime's original is another row: its speed is not this model's doing.
    baseline = next(each for each in report.rows if each.label == row.baseline)
    text = (
        f"{row.label} ({row.runtime}) decodes {with_interval(row.decode_speedup)} times as fast as {row.baseline}, "
        f"and reads a prompt {with_interval(row.prefill_speedup)} times as fast. "
    )
    if row.finite:
        text += (
            f"Its perplexity is {with_interval(row.perplexity_ratio, digits=4)} times that of {original.label}, "
            f"and its likeliest next token is the same {percent(row.agreement)} of the time."
        )
    else:
        text += "What it predicts is not all numbers: it is broken on this text."
    text += _answering(row, original)
    if row.decode_speedup.low <= 1 <= row.decode_speedup.high:
        text += " The interval of the decode speed-up holds 1: no difference was shown."
    if baseline.runtime != row.runtime:
        text += (
            f" As {row.baseline} ran on {baseline.runtime}, this speed and size are also the change of runtime's: "
            "to see the model's own, measure an export of the original beside it."
        )
    return text


def _answering(row: Measurement, original: Measurement) -> str:
    if row.question_accuracy is None or original.question_accuracy is None or row.stability is None:
        return ""
    return (
        f" It answers {percent(row.question_accuracy)} of the questions right, {original.label} "
        f"{percent(original.question_accuracy)}; its stability is {percent(row.stability)}."
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
        "Ran on",
        "The program that ran it, and the numbers it computed in.",
        lambda r: f"{r.runtime}, {r.dtype}",
    ),
    TableRow(
        "Model", "Speed and size against", "Whose times and size this column's ratios are over.", lambda r: r.baseline
    ),
    TableRow("Model", "Commit", "Of the Hub repository that it was read from.", lambda r: r.commit[:12]),
    TableRow("Model", "Layers", "Decoder layers. One without attention keeps no cache.", _layers),
    TableRow(
        "Model",
        "Parameters",
        "Numbers learnt in training. Some may be zeros that are never computed with.",
        _parameters,
    ),
    TableRow(
        "Model",
        "Size on disk",
        "Weights as stored, and how that compares.",
        lambda r: f"{size(r.disk_bytes)} ({number(r.size_ratio)}x)",
    ),
    TableRow(
        "Model", "Cache per token", "Memory that each token of context takes.", lambda r: size(r.kv_bytes_per_token)
    ),
    TableRow(
        "Accuracy",
        "Perplexity",
        "How unsure the model is of each next token: like choosing among so many. Lower is better.",
        lambda r: with_interval(r.perplexity),
    ),
    TableRow(
        "Accuracy",
        "Perplexity ratio",
        "Over the original's, on the same text. 1 is no change, higher is worse.",
        lambda r: with_interval(r.perplexity_ratio, "x", 4),
    ),
    TableRow(
        "Accuracy",
        "KL from original",
        "How far its predictions moved from the original's, nats per token. 0 is not at all.",
        lambda r: with_interval(r.kl),
    ),
    TableRow(
        "Accuracy",
        "Same next token",
        "How often its likeliest next token is the original's.",
        lambda r: percent(r.agreement),
    ),
    TableRow(
        "Accuracy",
        "Questions right",
        "How often the right one of several options is the one of lowest perplexity.",
        lambda r: percent(r.question_accuracy) if r.question_accuracy else "",
    ),
    TableRow(
        "Accuracy",
        "Stability",
        "How often it is right where the original is, and wrong where that is; the questions on whose options the "
        "original is most divided count most (LLM-Streamline).",
        lambda r: percent(r.stability) if r.stability else "",
    ),
    TableRow(
        "Speed",
        "Time to first token",
        "Reading the prompt, median of the rounds.",
        lambda r: with_interval(r.prefill_ms, " ms"),
    ),
    TableRow(
        "Speed",
        "Prefill speed-up",
        "Of the time to first token. Higher is faster.",
        lambda r: with_interval(r.prefill_speedup, "x"),
    ),
    TableRow(
        "Speed",
        "Ideal prefill speed-up",
        "If only arithmetic took time, and the share of it that was reached.",
        lambda r: _ideal(r, r.prefill_speedup, r.ideal_prefill_speedup),
    ),
    TableRow(
        "Speed",
        "Time per token",
        "Writing one more token, median of the rounds.",
        lambda r: with_interval(r.decode_ms, " ms"),
    ),
    TableRow(
        "Speed",
        "Decode speed-up",
        "Of the time per token. Higher is faster.",
        lambda r: with_interval(r.decode_speedup, "x"),
    ),
    TableRow(
        "Speed",
        "Ideal decode speed-up",
        "If only reading weights and cache took time, and the share of it that was reached.",
        lambda r: _ideal(r, r.decode_speedup, r.ideal_decode_speedup),
    ),
    TableRow(
        "Speed",
        "Peak memory",
        "Most held by its process: RAM, or the GPU's where torch ran on one.",
        lambda r: size(r.peak_bytes),
    ),
)
