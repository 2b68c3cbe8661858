"""Check the type and the range of a value with pydantic."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from optimum.streamline.errors import StreamlineError, shown

# Strict: pydantic must not convert values. `"16"`, `16.0` and `true` are no integers.
_STRICT = ConfigDict(strict=True, allow_inf_nan=False)
# Our messages for pydantic's errors of these types, which say less.
_TYPES = {
    "bool_type": "must be true or false",
    "int_type": "must be an integer",
    "float_type": "must be a number",
    "string_type": "must be a string (in quotes, if it looks like a number)",
}


def validated(value: Any, name: str, annotation: Any, pattern: str = "", form: str = "") -> Any:
    """Check a value. An integer is converted if the type is a float.

    Args:
        value: Any value.
        name: The value's name for the message.
        annotation: The type with its range.
        pattern: A regular expression that a string, or a number as text, must match as a whole.
        form: What a string must look like, for the message; without `pattern`, what any value must look like.

    Raises:
        StreamlineError: the value is of another type or form, or out of range.
    """
    try:
        value = _adapter(annotation).validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        message = form if form and not pattern else _TYPES.get(first["type"], first["msg"])
        raise StreamlineError(f"{name} is {shown(value)}: {message}") from None
    if pattern and value is not None and not re.fullmatch(pattern, str(value)):
        raise StreamlineError(f"{name} is {shown(value)}: {form}")
    return value


@cache
def _adapter(annotation: Any) -> TypeAdapter[Any]:
    return TypeAdapter(annotation, config=_STRICT)
