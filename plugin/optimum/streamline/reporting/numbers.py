"""Formatting figures for reports: significant digits, intervals, percentages, sizes and durations.

`rich.filesize` and humanize round to decimal places, not to significant digits.
"""

from __future__ import annotations

import math

from optimum.streamline.evaluation.intervals import Interval


def number(value: float, digits: int = 3) -> str:
    """Format a number with `digits` significant digits, and with an exponent only if it is very small or very large.

    >>> number(0.00124), number(1234.5), number(0.9999), number(2e-9), number(float("nan"))
    ('0.00124', '1,234', '1.00', '2.00e-09', 'not a number')
    """
    return _in_format(value, _format_of(value, digits))


def with_interval(figure: Interval, unit: str = "", digits: int = 3) -> str:
    """Format a figure with its interval, such as `1.25x [1.18, 1.31]`. The interval is left out if it has no width.

    >>> with_interval(Interval(1.05, 0.9712, 1.314), "x"), with_interval(Interval(1.0, 1.0, 1.0), "x")
    ('1.05x [0.97, 1.31]', '1.00x')
    """
    text = number(figure.value, digits) + (unit if figure.finite else "")
    if figure.low == figure.value == figure.high or not figure.finite:
        return text
    form = _format_of(figure.value or figure.high, digits)
    return f"{text} [{_in_format(figure.low, form)}, {_in_format(figure.high, form)}]"


def percent(share: Interval) -> str:
    """Format a share between 0 and 1, with its interval, as a percentage.

    >>> percent(Interval(0.8231, 0.815, 0.83))
    '82.3% [81.5, 83.0]'
    """
    if share.low == share.value == share.high or not share.finite:
        return f"{100 * share.value:.1f}%"
    return f"{100 * share.value:.1f}% [{100 * share.low:.1f}, {100 * share.high:.1f}]"


def size(count: float) -> str:
    """Format a number of bytes, in powers of 1000.

    >>> size(7_364_224), size(512)
    ('7.36 MB', '512 B')
    """
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{number(count / scale)} {unit}"
    return f"{count:.0f} B"


def duration(seconds: float) -> str:
    """Format a number of seconds, in the largest unit of which there are two or more.

    >>> duration(0.2), duration(90), duration(300), duration(10_000)
    ('0.200 s', '90.0 s', '5.00 min', '2.78 h')
    """
    for unit, scale in (("h", 3600), ("min", 60)):
        if seconds >= 2 * scale:
            return f"{number(seconds / scale)} {unit}"
    return f"{number(seconds)} s"


def _format_of(value: float, digits: int) -> str:
    if value == 0 or not math.isfinite(value):
        return ",.0f"
    # Rounded before the logarithm, so that 0.9999 has the decimals of 1.00.
    exponent = math.floor(math.log10(abs(float(f"{value:.{digits - 1}e}"))))
    return f".{digits - 1}e" if exponent < -4 or exponent > 9 else f",.{max(0, digits - 1 - exponent)}f"


def _in_format(value: float, form: str) -> str:
    if math.isnan(value):
        return "not a number"
    if math.isinf(value):
        return "infinite" if value > 0 else "minus infinite"
    return format(value, form)
