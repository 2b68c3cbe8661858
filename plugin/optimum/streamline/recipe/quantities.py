"""Parse quantities as a user writes them: layer numbers `3,7,11-13`, a count of layers `25%`, a size `1.5GB`."""

from __future__ import annotations

import re

from optimum.streamline.errors import StreamlineError, shown


def parse_layers(text: str, total: int) -> tuple[int, ...]:
    """The layer numbers, 0-based and rising, that a text such as `3,7,11-13` names.

    Args:
        text: Numbers and ranges, separated by commas.
        total: The number of layers of the model.

    Raises:
        StreamlineError: the text has another form, or names a layer that the model does not have.

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
    """The number of layers that the model loses.

    Args:
        value: A number of layers such as 4, or a share such as `25%`, which is rounded to the nearest whole layer.
        total: The number of layers of the model.

    Raises:
        StreamlineError: the value has another form, or no layer or every layer would be removed.

    >>> parse_remove("25%", 12)
    3
    """
    text = str(value).strip()
    match = re.fullmatch(r"(0*[0-9]{1,9}(?:\.[0-9]+)?)(%?)", text)
    if not match or (not match[2] and "." in match[1]):
        raise StreamlineError(f"remove {shown(value)}: must be a number of layers or a share such as 25%")
    count = int(float(match[1]) * total / 100 + 0.5) if match[2] else int(match[1])
    if not 0 < count < total:
        raise StreamlineError(
            f"remove {value!r}: that is {count} of {total} layers; at least 1 must be removed, and 1 must stay"
        )
    return count


def memory_limit(max_memory: int | str | None) -> int | None:
    """The bytes of memory to make do with; `None` for what is free.

    Args:
        max_memory: The option `max_memory`.

    Raises:
        StreamlineError: it is not a size above zero.
    """
    return None if max_memory is None else parse_size(max_memory, "max-memory")


def parse_size(value: int | str, name: str) -> int:
    """The number of bytes in a size.

    Args:
        value: A number of bytes, or a size such as `500MB` or `1.5GB`.
        name: What the message calls the value.

    Raises:
        StreamlineError: the value is not a size above zero.

    >>> parse_size("1.5GB", "max-memory")
    1500000000
    """
    number = str(value).strip().upper().removesuffix("B")
    unit = {"K": 10**3, "M": 10**6, "G": 10**9}.get(number[-1:], 1)
    try:
        count = int(float(number if unit == 1 else number[:-1]) * unit)
    except (ValueError, OverflowError):
        count = 0
    if count <= 0:
        raise StreamlineError(f"{name} {value!r}: must be a number of bytes, or a size such as 500MB or 1.5GB")
    return count
